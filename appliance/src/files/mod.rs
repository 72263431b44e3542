//! Files out of disks, without booting them: what lies on the disks of a recovery point or of a running recovery, and
//! the content of their file systems.

pub mod answer;
mod find;
mod list;
mod mounts;
pub mod place;
mod send;
mod source;
mod tar;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use find::{find, versions};
pub use list::{list, volumes};
pub use mounts::{MountHold, MountRequest, Mounts};
pub use send::{Copy, Remark, send};
pub use source::{Disks, live, of_point};

/// A place in the disks of a recovery point or a recovery, as a person names it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Place {
    /// The recovery whose present disks are meant; a recovery point when not given.
    #[serde(default)]
    pub recovery: Option<String>,
    /// `POINT[:DISK[:VOLUME[:PATH]]]`, or the same without `POINT:` for a recovery.
    pub spec: String,
}

/// What to list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ListRequest {
    /// Where.
    #[serde(flatten)]
    pub place: Place,
    /// The path in it, if the place has none.
    #[serde(default)]
    pub path: Option<String>,
}

/// What to copy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct CopyRequest {
    /// Files and trees; the last component of a path may be a glob.
    pub places: Vec<Place>,
}

/// What to look for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct FindRequest {
    /// Where.
    #[serde(flatten)]
    pub place: Place,
    /// A glob: of a name, or with a slash of a path.
    pub glob: String,
}

/// A file whose versions are asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct VersionsRequest {
    /// The machine.
    pub machine: String,
    /// `[DISK:VOLUME:]PATH`.
    pub path: String,
}
