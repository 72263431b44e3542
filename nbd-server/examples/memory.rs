//! Serves a disk in memory: `memory LISTEN SIZE_MIB [fill] [miss]`. With `fill` every page holds data, with `miss` no
//! read counts as resident.

use std::sync::Arc;

use nbd_server::export::Export;
use nbd_server::{ExportName, ExportTable, Limits, Listen, MemoryExport, Server};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let listen: Listen = arguments.next().ok_or("usage: memory LISTEN SIZE_MIB [fill] [miss]")?.parse()?;
    let size: u64 = arguments.next().ok_or("no size")?.parse::<u64>()? << 20;
    let mut disk = MemoryExport::new(size);
    for word in arguments {
        match word.as_str() {
            "fill" => fill(&disk, size)?,
            "miss" => disk = disk.not_resident(),
            other => return Err(format!("unknown word '{other}'").into()),
        }
    }
    let table = Arc::new(ExportTable::new());
    table.add(ExportName::default(), Arc::new(disk))?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let listener = Server::new(table, Limits::default()).bind(&listen).await?;
        listener.serve(tokio::signal::ctrl_c()).await;
        Ok(())
    })
}

fn fill(disk: &MemoryExport, size: u64) -> Result<(), nbd_server::export::ExportError> {
    let block: Vec<u8> = (0..1_u32 << 20).map(|at| (at % 251).to_le_bytes()[0] | 1).collect();
    for offset in (0..size).step_by(1 << 20) {
        disk.write(offset, &block)?;
    }
    Ok(())
}
