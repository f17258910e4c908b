//! Fault kind `corrupt`: bytes that are not the true ones.
//!
//! Owns the checked form and the choice of the bytes to overwrite. Invariant: what is done to a buffer is a pure function of the rule's key, the match
//! number and the buffer's length; no byte outside the buffer is named.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::Rng;

use crate::check::{Checker, check_size};
use crate::draw::{RuleKey, below};
use crate::spec::CorruptSpec;

/// Most segments of one operation: more would hold up the server for nothing.
pub const MOST_OCCURRENCES: u32 = 65_536;

/// What is put in the place of the true bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fill {
    /// Zero bytes.
    Zero,
    /// Random bytes, which may by chance be the true ones.
    Random,
}

impl Fill {
    /// Every filling.
    pub const ALL: [Self; 2] = [Self::Zero, Self::Random];

    /// The word for it in a rule.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Zero => "zero",
            Self::Random => "random",
        }
    }
}

/// A checked `corrupt` fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CorruptFault {
    pub(crate) fill: Fill,
    pub(crate) occurrences: u32,
    pub(crate) length: u64,
}

impl CorruptFault {
    /// What is put in the place of the true bytes.
    #[must_use]
    pub const fn fill(&self) -> Fill {
        self.fill
    }

    /// Most segments of one operation.
    #[must_use]
    pub const fn occurrences(&self) -> u32 {
        self.occurrences
    }

    /// Most bytes of one segment.
    #[must_use]
    pub const fn length(&self) -> u64 {
        self.length
    }
}

/// What to do to the data of one operation. A value: the same value does the same to equal buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Corruption {
    pub(crate) fault: CorruptFault,
    pub(crate) key: RuleKey,
    pub(crate) scope: u64,
    pub(crate) n: u64,
}

/// Bytes of a buffer to overwrite.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// First byte, counted from the start of the buffer.
    pub offset: usize,
    /// How many bytes; `offset + len` is within the buffer.
    pub len: usize,
}

impl Corruption {
    /// What is put in the place of the true bytes.
    #[must_use]
    pub const fn fill(&self) -> Fill {
        self.fault.fill
    }

    /// The segments for a buffer of `len` bytes, in the order in which they are written; they may overlap. None for an empty buffer.
    #[must_use]
    pub fn segments(&self, len: usize) -> Vec<Segment> {
        self.layout(len, &mut self.stream())
    }

    /// Overwrites `buffer`, and says where.
    pub fn apply(&self, buffer: &mut [u8]) -> Vec<Segment> {
        let mut stream = self.stream();
        let segments = self.layout(buffer.len(), &mut stream);
        for segment in &segments {
            let Some(bytes) = buffer.get_mut(segment.offset..segment.offset + segment.len) else {
                continue;
            };
            match self.fault.fill {
                Fill::Zero => bytes.fill(0),
                Fill::Random => stream.fill_bytes(bytes),
            }
        }
        segments
    }

    /// The numbers of this operation, past the draws that every match has (`Draws`).
    fn stream(&self) -> ChaCha8Rng {
        let mut stream = self.key.stream(self.scope, self.n);
        stream.set_word_pos(1 << 10);
        stream
    }

    fn layout(&self, len: usize, stream: &mut ChaCha8Rng) -> Vec<Segment> {
        if len == 0 {
            return Vec::new();
        }
        let size = len as u64;
        let count = 1 + below(stream.next_u64(), u64::from(self.fault.occurrences));
        let mut segments = Vec::with_capacity(usize::try_from(count).unwrap_or(0));
        for _ in 0..count {
            let offset = below(stream.next_u64(), size);
            let wanted = 1 + below(stream.next_u64(), self.fault.length);
            let run = wanted.min(size - offset);
            // Both are at most `len`.
            let (Ok(offset), Ok(run)) = (usize::try_from(offset), usize::try_from(run)) else {
                continue;
            };
            segments.push(Segment { offset, len: run });
        }
        segments
    }
}

/// Checks the raw form.
pub(crate) fn check(checker: &mut Checker<'_>, spec: &CorruptSpec) -> Option<CorruptFault> {
    let words = Fill::ALL.map(|fill| (fill.name(), fill));
    let shape = match spec {
        CorruptSpec::Fill(word) => {
            let fill = checker.word("fault.corrupt", "filling", word, &words)?;
            return Some(CorruptFault {
                fill,
                occurrences: 1,
                length: 1,
            });
        }
        CorruptSpec::Full(shape) => shape,
    };
    let fill = checker.word("fault.corrupt.fill", "filling", &shape.fill, &words);
    let occurrences = match u32::try_from(shape.occurrences.unwrap_or(1)) {
        Ok(occurrences) if (1..=MOST_OCCURRENCES).contains(&occurrences) => Some(occurrences),
        _ => {
            checker.error(
                "fault.corrupt.occurrences",
                format!("must be between 1 and {MOST_OCCURRENCES}"),
            );
            None
        }
    };
    let length = match &shape.length {
        Some(length) => check_size(checker, "fault.corrupt.length", length)?,
        None => 1,
    };
    if length == 0 {
        checker.error("fault.corrupt.length", "segments of no bytes alter nothing");
        return None;
    }
    Some(CorruptFault {
        fill: fill?,
        occurrences: occurrences?,
        length,
    })
}
