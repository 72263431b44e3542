//! The NBD protocol: a server for anything that is an [`export::Export`], and a client.
//!
//! The server speaks fixed newstyle negotiation with structured replies, metadata contexts and extended headers. It
//! knows nothing of where the bytes of an export come from. What a client may cost is bounded by [`Limits`].
//!
//! ```no_run
//! # async fn serve() -> Result<(), Box<dyn std::error::Error>> {
//! use std::sync::Arc;
//! use nbd_server::{ExportName, ExportTable, Limits, MemoryExport, Server};
//!
//! let table = Arc::new(ExportTable::new());
//! let name = ExportName::new("disk0")?;
//! table.add(name.clone(), Arc::new(MemoryExport::new(1 << 30)))?;
//! let listener = Server::new(table, Limits::default()).bind(&"unix:/run/disk0.sock".parse()?).await?;
//! let uri = listener.uri(&name); // nbd+unix:///disk0?socket=/run/disk0.sock
//! listener.serve(tokio::signal::ctrl_c()).await;
//! # Ok(())
//! # }
//! ```
#![forbid(unsafe_code)]

mod budget;
pub mod client;
mod control;
mod dispatch;
pub mod export;
mod handshake;
mod limits;
mod listen;
mod memory;
mod name;
mod server;
mod statistics;
mod stream;
mod table;
pub mod tls;
mod transmission;
mod uri;
pub mod wire;

pub use client::{BlockingClient, Client, ClientError, ClientOptions};
pub use export::Export;
pub use limits::{Limits, MAX_EXTENTS, MAX_PAYLOAD};
pub use listen::{Listen, ListenError, MAX_SOCKET_PATH};
pub use memory::{MemoryExport, WRITTEN_CONTEXT};
pub use name::{ExportName, MAX_NAME, NameError};
pub use server::{Listener, Server};
pub use statistics::{Count, LATENCY_BOUNDS_US, Latency, OPERATIONS, Operation, Statistics};
pub use table::{Access, AddError, ExportTable, Retirement};
pub use tls::{ClientCertificates, ClientName, TlsClient, TlsError, TlsServer};
pub use transmission::HeaderStyle;
pub use uri::{Endpoint, NbdUri, UriError, UriTls};
