//! The names by which a node was last known, for matching rules.
//!
//! Owns (parent, name) pairs; a path is put together from them when a rule asks. Invariant: names are what FUSE operations have shown, nothing more: a name changed
//! behind the hook is noticed at the next lookup, and no file is ever found by a name kept here.

use hobble_fuse::NodeId;

use super::Store;

/// One name of a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Link {
    pub(crate) parent: NodeId,
    pub(crate) name: Box<[u8]>,
}

/// All known names of a node: one, as a rule; more for hard links.
#[derive(Debug, Default)]
pub(crate) enum Names {
    #[default]
    None,
    One(Link),
    Many(Vec<Link>),
}

/// Names remembered of one inode; with more, the oldest is forgotten.
const MOST: usize = 16;

/// Deepest path put together: `PATH_MAX` leaves no room for more components.
const DEEPEST: usize = 2048;

impl Names {
    /// These, the one used last first.
    pub(crate) fn of(links: Vec<(u64, Vec<u8>)>) -> Self {
        let mut links: Vec<Link> = links
            .into_iter()
            .map(|(parent, name)| Link {
                parent: NodeId(parent),
                name: name.into(),
            })
            .collect();
        match links.len() {
            0 => Self::None,
            1 => links.pop().map_or(Self::None, Self::One),
            _ => Self::Many(links),
        }
    }

    pub(crate) fn first(&self) -> Option<&Link> {
        self.iter().next()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Link> {
        let (one, many) = match self {
            Self::None => (None, [].as_slice()),
            Self::One(link) => (Some(link), [].as_slice()),
            Self::Many(links) => (None, links.as_slice()),
        };
        one.into_iter().chain(many)
    }

    /// Learns a name. `sole`: the inode has no other (a directory, or one link). Says whether anything changed.
    pub(crate) fn learn(&mut self, parent: NodeId, name: &[u8], sole: bool) -> bool {
        let known = |link: &Link| link.parent == parent && *link.name == *name;
        let link = || Link {
            parent,
            name: name.into(),
        };
        match self {
            Self::One(one) if known(one) => false,
            Self::None | Self::One(_) | Self::Many(_) if sole => {
                *self = Self::One(link());
                true
            }
            Self::None => {
                *self = Self::One(link());
                true
            }
            Self::One(one) => {
                *self = Self::Many(vec![link(), one.clone()]);
                true
            }
            Self::Many(links) => match links.iter().position(known) {
                Some(0) => false,
                Some(place) => {
                    let link = links.remove(place);
                    links.insert(0, link);
                    false
                }
                None => {
                    links.insert(0, link());
                    links.truncate(MOST);
                    true
                }
            },
        }
    }

    /// Unlearns a name, unless it is the only one: a file that was unlinked is still matched by the path it had.
    pub(crate) fn lose(&mut self, parent: NodeId, name: &[u8]) -> bool {
        let Self::Many(links) = self else {
            return false;
        };
        let before = links.len();
        links.retain(|link| !(link.parent == parent && *link.name == *name));
        let changed = links.len() != before;
        if let [only] = links.as_slice() {
            *self = Self::One(only.clone());
        }
        changed
    }

    /// Replaces a name, as a rename does.
    pub(crate) fn rename(&mut self, from: (NodeId, &[u8]), to: (NodeId, &[u8])) {
        match self {
            Self::Many(links) => {
                links.retain(|link| !(link.parent == from.0 && *link.name == *from.1));
                links.retain(|link| !(link.parent == to.0 && *link.name == *to.1));
                links.insert(
                    0,
                    Link {
                        parent: to.0,
                        name: to.1.into(),
                    },
                );
            }
            Self::None | Self::One(_) => {
                *self = Self::One(Link {
                    parent: to.0,
                    name: to.1.into(),
                })
            }
        }
    }
}

impl Store {
    /// The path of a name below the root.
    pub(crate) fn path_of_link(&self, link: &Link) -> Option<Vec<u8>> {
        self.path_of_child(link.parent, &link.name)
    }

    /// The path of `name` in the directory `parent`, whether it exists or not.
    pub(crate) fn path_of_child(&self, parent: NodeId, name: &[u8]) -> Option<Vec<u8>> {
        let mut parts: Vec<Box<[u8]>> = vec![name.into()];
        let mut at = parent;
        while at != NodeId::ROOT {
            if parts.len() > DEEPEST {
                return None;
            }
            let link = self.get(at)?.with_names(|names| names.first().cloned())?;
            at = link.parent;
            parts.push(link.name);
        }
        parts.reverse();
        Some(parts.join(&b'/'))
    }

    /// Every known path of a node.
    pub(crate) fn paths_of(&self, id: NodeId) -> Vec<Vec<u8>> {
        if id == NodeId::ROOT {
            return vec![Vec::new()];
        }
        let Some(node) = self.get(id) else {
            return Vec::new();
        };
        let links: Vec<Link> = node.with_names(|names| names.iter().cloned().collect());
        links
            .iter()
            .filter_map(|link| self.path_of_link(link))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: NodeId = NodeId(2);
    const B: NodeId = NodeId(3);

    fn list(names: &Names) -> Vec<(u64, &str)> {
        names
            .iter()
            .map(|link| (link.parent.0, std::str::from_utf8(&link.name).unwrap()))
            .collect()
    }

    #[test]
    fn a_hard_link_is_known_by_all_its_names_the_last_one_first() {
        let mut names = Names::default();
        assert!(names.learn(A, b"x", false));
        assert!(!names.learn(A, b"x", false));
        assert!(names.learn(B, b"y", false));
        assert_eq!(list(&names), [(3, "y"), (2, "x")]);
        assert!(!names.learn(A, b"x", false));
        assert_eq!(list(&names), [(2, "x"), (3, "y")]);
        assert!(names.lose(B, b"y"));
        assert_eq!(list(&names), [(2, "x")]);
    }

    #[test]
    fn the_last_name_of_an_unlinked_file_stays() {
        let mut names = Names::default();
        names.learn(A, b"x", true);
        assert!(!names.lose(A, b"x"));
        assert_eq!(list(&names), [(2, "x")]);
    }

    #[test]
    fn a_rename_replaces_one_name() {
        let mut names = Names::default();
        names.learn(A, b"x", false);
        names.learn(B, b"y", false);
        names.rename((A, b"x"), (B, b"z"));
        assert_eq!(list(&names), [(3, "z"), (3, "y")]);
    }
}
