//! Rehydration: what a guest sees is copied to production storage while it runs, and a cutover moves it there. Why it
//! is right: docs/design/rehydration.md

mod checkpoint;
mod compare;
mod copier;
mod gate;
mod live;
mod mirror;
mod mirrored;
mod pace;
mod plan;
mod qcow2;
mod regions;
mod stream;
mod target;

pub use checkpoint::read as written_before;
pub use copier::{CopyError, Move};
pub use live::LiveDisk;
pub use mirror::Mirror;
pub use mirrored::{MirrorFault, Mirrored};
pub use plan::{Mode, Plan, PlannedDisk, RehydrateRequest, Target, parse_target};
pub use regions::{REGION, RegionSet, Regions, touched};
pub use stream::{Phase, Progress, Stream, Watch};
pub use target::{Opening, Place, Production, Readback, open, open_readback};
