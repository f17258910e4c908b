//! What is attached on this machine.

use std::path::Path;

use hobble_api::status::Status;

use crate::client::Client;
use crate::error::{AttachError, Step};
use crate::state_dir::StateDir;

/// One attachment found in the state directory.
#[derive(Debug)]
pub struct Listed {
    /// Its id.
    pub id: String,
    /// Its status, or why its server could not be asked.
    pub status: Result<Box<Status>, AttachError>,
}

/// The ids of all attachments, sorted; none when there is no state directory.
///
/// # Errors
/// When the state directory cannot be trusted or read.
pub fn ids(state_dir: &Path) -> Result<Vec<String>, AttachError> {
    if !state_dir.exists() {
        return Ok(Vec::new());
    }
    StateDir::open(state_dir, false)
        .and_then(|state| state.ids())
        .map_err(|error| {
            AttachError::new(Step::Control, "the attachments cannot be listed").because(error)
        })
}

/// Every attachment with its status.
///
/// # Errors
/// As [`ids`]; an attachment that cannot be asked is an entry, not an error.
pub fn list(state_dir: &Path) -> Result<Vec<Listed>, AttachError> {
    Ok(ids(state_dir)?
        .into_iter()
        .map(|id| {
            let status = Client::open(state_dir, &id)
                .and_then(|mut client| client.status())
                .map(Box::new);
            Listed { id, status }
        })
        .collect())
}
