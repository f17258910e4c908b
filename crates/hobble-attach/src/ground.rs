//! What a hook lies on: the volume as it was found, or what a dead server has left of it.

use std::path::{Path, PathBuf};

use hobble_graft::ids::{Device, ProcessId};
use hobble_graft::mounts::PropagationRecord;
use hobble_graft::proc::tree::MountNamespaceId;
use serde::{Deserialize, Serialize};

use crate::volume::{self, Volume};

/// What the hook lies on.
pub(crate) enum Ground {
    /// The volume as it was found.
    Volume(Volume),
    /// What a dead server has left of it.
    Inherited(Inherited),
}

/// A hook that a dead server has left: where it lies, and how the mount around it is to propagate when it has gone.
#[derive(Debug, Clone)]
pub(crate) struct Inherited {
    pub(crate) device: Device,
    pub(crate) target: Option<ProcessId>,
    pub(crate) path: PathBuf,
    pub(crate) namespace: MountNamespaceId,
    pub(crate) around: Option<PropagationRecord>,
    pub(crate) ground: GroundNote,
}

/// Names of a volume, for a successor.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct GroundNote {
    pub(crate) absolute: Vec<u8>,
    pub(crate) printed: Vec<u8>,
    pub(crate) only_file: Option<Vec<u8>>,
}

impl Ground {
    /// The names of what it lies on, for a successor.
    pub(crate) fn note(&self) -> GroundNote {
        match self {
            Self::Volume(volume) => GroundNote {
                absolute: volume.absolute().to_vec(),
                printed: volume.printed().to_vec(),
                only_file: volume.only_file().map(<[u8]>::to_vec),
            },
            Self::Inherited(inherited) => inherited.ground.clone(),
        }
    }

    /// The volume's path as the target sees it.
    pub(crate) fn absolute(&self) -> &[u8] {
        match self {
            Self::Volume(volume) => volume.absolute(),
            Self::Inherited(inherited) => &inherited.ground.absolute,
        }
    }

    /// The name of the only file that rules are for.
    pub(crate) fn only_file(&self) -> Option<&[u8]> {
        match self {
            Self::Volume(volume) => volume.only_file(),
            Self::Inherited(inherited) => inherited.ground.only_file.as_deref(),
        }
    }

    /// A path below the volume, of one that `/proc` shows.
    pub(crate) fn relative(&self, path: &Path) -> Vec<u8> {
        match self {
            Self::Volume(volume) => volume.relative(path),
            Self::Inherited(inherited) => volume::below(&inherited.ground.printed, path)
                .or_else(|| volume::below(b"/", path))
                .unwrap_or_default(),
        }
    }
}

impl Inherited {
    /// Gives the mount around the volume back how it propagated; only when the hook has gone, since the way to it leads through the hook until then.
    pub(crate) fn restore_propagation(&self) {
        let (Some(target), Some(around)) = (self.target, self.around) else {
            return;
        };
        let restored = Volume::resolve(target, &self.path)
            .and_then(|volume| volume::restore_propagation(&volume, around));
        if let Err(error) = restored {
            tracing::warn!(%error, cause = error.cause_chain(), "the mount around the volume may propagate differently than before");
        }
    }
}
