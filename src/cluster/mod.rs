//! Where a run goes on: which ranks there are, who of them holds what, and what they send each other.
//!
//! Knows tensors as rows and columns and where they belong in a model, not what they mean.

// Who works with whom, and who holds which part of which tensor.
pub mod layout;
pub mod mesh;

// How ranks speak with each other, and what they do together.
mod agreement;
pub mod carrier;
pub mod collective;
pub mod control;
pub mod join;
pub mod link;
pub mod local;
#[cfg(feature = "mpi")]
pub mod mpi;
#[cfg(feature = "mpi")]
mod mpi_calls;
#[cfg(any(feature = "cuda", test))]
pub mod nccl;
mod outbox;
pub mod pipe;
pub mod progress;
pub mod stop;
pub mod team;
pub mod timeline;
mod wait;
pub mod wire;

// What a change of layout sends.
pub mod reshard;

#[cfg(feature = "mpi")]
pub use self::mpi::Mpi;
pub use carrier::Carrier;
pub use collective::Group;
pub use control::{Control, Letter};
pub use join::{Ident, Joined, join};
pub use layout::{Home, Slice, Tensor, Training};
pub use link::{Broken, Link};
pub use local::Local;
pub use mesh::{Mesh, MeshError};
pub use pipe::Pipe;
pub use progress::{Board, Work, made, work_for};
pub use reshard::{Moved, Plan};
pub use stop::Stop;
pub use team::Team;
pub use timeline::{Doing, Span, Timeline};
