//! Patterns for paths and for process names.
//!
//! Owns the meaning of a glob: relative to the volume, or absolute when it begins with `/`; without a slash it matches at any depth; `*` and `?` stop at
//! `/`; `dir/**` is what lies below `dir`. Patterns match bytes, so a name that is not UTF-8 is matched like any other, and `?` is one byte. Invariant: a
//! pattern that exists has been compiled.

use globset::{Candidate, Glob, GlobBuilder, GlobMatcher, GlobSet};

/// Longest pattern, in bytes: as long as the longest path (PATH_MAX).
const LONGEST: usize = 4096;

/// Most bytes of all patterns of an experiment together: compiling them must not take long.
pub(crate) const MOST_BYTES: usize = 128 << 10;

/// Characters that make a pattern more than a name.
pub(crate) const WILDCARDS: [char; 5] = ['*', '?', '[', '{', '\\'];

/// Deepest nesting of `{…}`; the compiler of the globs is recursive.
const DEEPEST: usize = 8;

/// A pattern for paths.
#[derive(Clone, Debug)]
pub(crate) struct PathPattern {
    text: String,
    absolute: bool,
    root: bool,
    glob: Glob,
}

impl PathPattern {
    /// Compiles a pattern; the error is the cause, and what to write instead when that is known.
    pub(crate) fn new(text: &str) -> Result<Self, (String, Option<String>)> {
        let plain = text.trim_start_matches("./");
        if plain.is_empty() {
            return Err((
                "an empty pattern matches nothing".into(),
                Some("`**` is everything".into()),
            ));
        }
        if plain != "/" && plain.ends_with('/') {
            let dir = plain.trim_end_matches('/');
            let hint = format!("`{dir}` is the directory itself, `{dir}/**` what lies below");
            return Err((
                "a pattern that ends in `/` matches nothing".into(),
                Some(hint),
            ));
        }
        if plain.contains("//")
            || plain
                .split('/')
                .any(|part| part == ".." || (part == "." && plain != "."))
        {
            return Err((
                "a pattern with `.`, `..` or `//` inside matches nothing".into(),
                None,
            ));
        }
        let absolute = plain.starts_with('/');
        let root = matches!(plain, "." | "**");
        let glob = if plain.contains('/') || root {
            compile(plain, true)
        } else {
            compile(&format!("**/{plain}"), true)
        };
        Ok(Self {
            text: text.to_owned(),
            absolute,
            root,
            glob: glob.map_err(|cause| (cause, None))?,
        })
    }

    /// Whether it plainly matches every path that `other` can match: it is the same, or `dir/**` and the other lies below `dir`.
    pub(crate) fn covers(&self, other: &Self) -> bool {
        let dir = self
            .text
            .strip_suffix("**")
            .filter(|dir| dir.ends_with('/') && !dir.contains(WILDCARDS));
        self.text == other.text
            || dir.is_some_and(|dir| other.text.starts_with(dir) && other.text != *dir)
    }

    /// Whether it matches everything in the volume.
    pub(crate) fn is_everything(&self) -> bool {
        self.text == "**"
    }
}

/// A pattern for process names.
#[derive(Clone, Debug)]
pub(crate) enum CommPattern {
    /// A name.
    Name(String),
    /// A glob.
    Glob(GlobMatcher),
}

impl CommPattern {
    /// Compiles a pattern.
    pub(crate) fn new(text: &str) -> Result<Self, String> {
        if !text.contains(WILDCARDS) {
            return Ok(Self::Name(text.to_owned()));
        }
        compile(text, false).map(|glob| Self::Glob(glob.compile_matcher()))
    }

    /// Whether the name matches.
    pub(crate) fn matches(&self, comm: &[u8]) -> bool {
        match self {
            Self::Name(name) => name.as_bytes() == comm,
            Self::Glob(matcher) => matcher.is_match_candidate(&Candidate::from_bytes(comm)),
        }
    }
}

fn compile(text: &str, separator: bool) -> Result<Glob, String> {
    if text.len() > LONGEST {
        return Err(format!(
            "a pattern may have {LONGEST} bytes, this one has {}",
            text.len()
        ));
    }
    if text.contains('\0') {
        return Err("a pattern cannot contain a NUL byte".into());
    }
    let mut depth = 0_usize;
    for character in text.chars() {
        match character {
            '{' => depth += 1,
            '}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth > DEEPEST {
            return Err(format!("braces may be nested {DEEPEST} deep"));
        }
    }
    let built = GlobBuilder::new(text)
        .literal_separator(separator)
        .backslash_escape(true)
        .empty_alternates(true)
        .build();
    built.map_err(|error| format!("not a glob: {}", error.kind()))
}

/// All path patterns of an experiment in one matcher.
#[derive(Clone, Debug)]
pub(crate) struct PathIndex {
    relative: GlobSet,
    absolute: GlobSet,
    /// Whom the patterns of `relative` belong to, in its order.
    relative_owners: Vec<Owner>,
    /// Whom the patterns of `absolute` belong to, in its order.
    absolute_owners: Vec<Owner>,
}

/// Where a pattern is from.
#[derive(Clone, Copy, Debug)]
struct Owner {
    hit: PatternHit,
    root: bool,
}

/// A pattern that matched a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PatternHit {
    /// The rule's place in the experiment.
    pub(crate) rule: usize,
    /// Whether the pattern is one that excludes.
    pub(crate) excludes: bool,
}

impl PathIndex {
    /// Compiles the patterns of each rule: those to include and those to exclude.
    pub(crate) fn new<'a>(
        rules: impl Iterator<Item = (&'a [PathPattern], &'a [PathPattern])>,
    ) -> Result<Self, globset::Error> {
        let (mut relative, mut absolute) = (Vec::new(), Vec::new());
        let (mut relative_owners, mut absolute_owners) = (Vec::new(), Vec::new());
        for (rule, (include, exclude)) in rules.enumerate() {
            let include = include.iter().map(|pattern| (pattern, false));
            for (pattern, excludes) in include.chain(exclude.iter().map(|pattern| (pattern, true)))
            {
                let owner = Owner {
                    hit: PatternHit { rule, excludes },
                    root: pattern.root,
                };
                let (globs, owners) = if pattern.absolute {
                    (&mut absolute, &mut absolute_owners)
                } else {
                    (&mut relative, &mut relative_owners)
                };
                globs.push(&pattern.glob);
                owners.push(owner);
            }
        }
        Ok(Self {
            relative: GlobSet::new(relative)?,
            absolute: GlobSet::new(absolute)?,
            relative_owners,
            absolute_owners,
        })
    }

    /// Calls `hit` for every pattern that matches. `relative` is empty for the volume's root, which has no name in the volume and is therefore
    /// matched only by `**`, `.` and absolute patterns.
    pub(crate) fn each_match(
        &self,
        relative: &[u8],
        absolute: &[u8],
        mut hit: impl FnMut(PatternHit),
    ) {
        if relative.is_empty() {
            self.relative_owners
                .iter()
                .filter(|owner| owner.root)
                .for_each(|owner| hit(owner.hit));
        } else if !self.relative.is_empty() {
            for place in self
                .relative
                .matches_candidate(&Candidate::from_bytes(relative))
            {
                self.relative_owners
                    .get(place)
                    .into_iter()
                    .for_each(|owner| hit(owner.hit));
            }
        }
        if !self.absolute.is_empty() {
            for place in self
                .absolute
                .matches_candidate(&Candidate::from_bytes(absolute))
            {
                self.absolute_owners
                    .get(place)
                    .into_iter()
                    .for_each(|owner| hit(owner.hit));
            }
        }
    }
}
