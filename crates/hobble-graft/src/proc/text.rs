//! A cursor over the kernel's text, with the place of the first thing that is wrong.
//!
//! Invariant: no method reads past the end or panics, whatever the bytes are; a failed method says where and what it
//! expected.

/// Where a text stopped making sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected {expected} at byte {offset}")]
pub struct ParseError {
    /// Offset into the text, in bytes from its start.
    pub offset: usize,
    /// What should have been there.
    pub expected: &'static str,
}

impl ParseError {
    pub(crate) fn new(offset: usize, expected: &'static str) -> Self {
        Self { offset, expected }
    }
}

/// A position in a text.
#[derive(Clone, Debug)]
pub(crate) struct Cursor<'a> {
    text: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    pub(crate) fn new(text: &'a [u8]) -> Self {
        Self { text, at: 0 }
    }

    pub(crate) fn rest(&self) -> &'a [u8] {
        self.text.get(self.at..).unwrap_or_default()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.at >= self.text.len()
    }

    pub(crate) fn peek(&self) -> Option<u8> {
        self.text.get(self.at).copied()
    }

    pub(crate) fn error(&self, expected: &'static str) -> ParseError {
        ParseError::new(self.at, expected)
    }

    fn advance(&mut self, by: usize) -> &'a [u8] {
        let from = self.at;
        self.at = self.at.saturating_add(by).min(self.text.len());
        self.text.get(from..self.at).unwrap_or_default()
    }

    /// Steps over `literal`, which must be next.
    pub(crate) fn literal(
        &mut self,
        literal: &[u8],
        expected: &'static str,
    ) -> Result<(), ParseError> {
        if self.try_literal(literal) {
            Ok(())
        } else {
            Err(self.error(expected))
        }
    }

    /// Steps over `literal` if it is next.
    pub(crate) fn try_literal(&mut self, literal: &[u8]) -> bool {
        let there = self.rest().starts_with(literal);
        if there {
            self.advance(literal.len());
        }
        there
    }

    /// Steps over spaces and tabs; there may be none.
    pub(crate) fn blanks(&mut self) {
        let n = self
            .rest()
            .iter()
            .take_while(|b| matches!(b, b' ' | b'\t'))
            .count();
        self.advance(n);
    }

    /// The bytes up to the next blank, newline or the end; at least one.
    pub(crate) fn word(&mut self, expected: &'static str) -> Result<&'a [u8], ParseError> {
        let n = self
            .rest()
            .iter()
            .take_while(|b| !matches!(b, b' ' | b'\t' | b'\n'))
            .count();
        if n == 0 {
            Err(self.error(expected))
        } else {
            Ok(self.advance(n))
        }
    }

    /// The bytes up to `end`, which is stepped over too.
    pub(crate) fn until(
        &mut self,
        end: u8,
        expected: &'static str,
    ) -> Result<&'a [u8], ParseError> {
        let n = self
            .rest()
            .iter()
            .position(|b| *b == end)
            .ok_or_else(|| self.error(expected))?;
        let found = self.advance(n);
        self.advance(1);
        Ok(found)
    }

    /// The bytes up to the next newline or the end; the newline is stepped over.
    pub(crate) fn line(&mut self) -> &'a [u8] {
        let n = self.rest().iter().position(|b| *b == b'\n');
        let found = self.advance(n.unwrap_or(self.text.len()));
        self.advance(usize::from(n.is_some()));
        found
    }

    /// As [`Cursor::line`], as a cursor that still reports places in the whole text.
    pub(crate) fn line_cursor(&mut self) -> Cursor<'a> {
        let from = self.at;
        let end = from + self.line().len();
        Cursor {
            text: self.text.get(..end).unwrap_or_default(),
            at: from,
        }
    }

    /// The end of the line, which must be next.
    pub(crate) fn end(&self) -> Result<(), ParseError> {
        if self.is_empty() {
            Ok(())
        } else {
            Err(self.error("the end of the line"))
        }
    }

    /// A number without sign in `radix` (at most 16), as the kernel prints it: at least one digit and no overflow.
    fn number(&mut self, radix: u32, expected: &'static str) -> Result<u64, ParseError> {
        let mut value: u64 = 0;
        let mut digits = 0usize;
        for byte in self.rest() {
            let Some(digit) = char::from(*byte).to_digit(radix) else {
                break;
            };
            value = value
                .checked_mul(u64::from(radix))
                .and_then(|v| v.checked_add(u64::from(digit)))
                .ok_or_else(|| self.error(expected))?;
            digits += 1;
        }
        if digits == 0 {
            return Err(self.error(expected));
        }
        self.advance(digits);
        Ok(value)
    }

    pub(crate) fn decimal(&mut self, expected: &'static str) -> Result<u64, ParseError> {
        self.number(10, expected)
    }

    pub(crate) fn hex(&mut self, expected: &'static str) -> Result<u64, ParseError> {
        self.number(16, expected)
    }

    pub(crate) fn octal(&mut self, expected: &'static str) -> Result<u64, ParseError> {
        self.number(8, expected)
    }

    pub(crate) fn decimal_u32(&mut self, expected: &'static str) -> Result<u32, ParseError> {
        let place = self.error(expected);
        u32::try_from(self.decimal(expected)?).map_err(|_| place)
    }

    /// A decimal number that may have a minus sign.
    pub(crate) fn signed(&mut self, expected: &'static str) -> Result<i64, ParseError> {
        let place = self.error(expected);
        let negative = self.try_literal(b"-");
        let value = self.decimal(expected)?;
        let signed = if negative {
            0i64.checked_sub_unsigned(value)
        } else {
            i64::try_from(value).ok()
        };
        signed.ok_or(place)
    }
}

/// Undoes the kernel's `mangle_path`/`seq_escape`: `\` and three octal digits are one byte. Anything else stands for itself.
pub(crate) fn unescape(text: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((first, tail)) = rest.split_first() {
        match tail {
            [
                a @ b'0'..=b'3',
                b @ b'0'..=b'7',
                c @ b'0'..=b'7',
                after @ ..,
            ] if *first == b'\\' => {
                bytes.push(((a - b'0') << 6) | ((b - b'0') << 3) | (c - b'0'));
                rest = after;
            }
            _ => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_know_their_limits() {
        assert_eq!(
            Cursor::new(b"18446744073709551615x").decimal("n"),
            Ok(u64::MAX)
        );
        assert_eq!(
            Cursor::new(b"18446744073709551616").decimal("n"),
            Err(ParseError::new(0, "n"))
        );
        assert_eq!(Cursor::new(b"ffFF ").hex("n"), Ok(0xffff));
        assert_eq!(Cursor::new(b"0104002").octal("n"), Ok(0o104_002));
        assert_eq!(
            Cursor::new(b"-9223372036854775808").signed("n"),
            Ok(i64::MIN)
        );
        assert_eq!(
            Cursor::new(b"9223372036854775808").signed("n"),
            Err(ParseError::new(0, "n"))
        );
        assert_eq!(Cursor::new(b"-").signed("n"), Err(ParseError::new(1, "n")));
        assert_eq!(Cursor::new(b"").decimal("n"), Err(ParseError::new(0, "n")));
    }

    #[test]
    fn lines_keep_their_place() {
        let mut text = Cursor::new(b"one\ntwo 2\n");
        text.line();
        let mut line = text.line_cursor();
        assert_eq!(line.word("w"), Ok(&b"two"[..]));
        line.blanks();
        assert_eq!(
            line.literal(b"3", "three"),
            Err(ParseError::new(8, "three"))
        );
        assert!(text.is_empty());
    }

    #[test]
    fn escapes_are_undone_and_other_backslashes_kept() {
        assert_eq!(unescape(br"a\040b\011\134\012"), b"a b\t\\\n");
        assert_eq!(unescape(br"\08 \9 \400 \"), br"\08 \9 \400 \");
        assert_eq!(unescape(b"\xff\\377"), b"\xff\xff");
    }
}
