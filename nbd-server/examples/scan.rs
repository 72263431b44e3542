//! Reads a whole export with the client: `scan URI [REQUEST_KIB] [DEPTH]`.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use nbd_server::{Client, ClientOptions, NbdUri};

#[tokio::main]
#[expect(clippy::print_stdout, reason = "an example's result")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let uri: NbdUri = arguments.next().ok_or("usage: scan URI [REQUEST_KIB] [DEPTH]")?.parse()?;
    let length: u64 = arguments.next().map_or(Ok(256), |text| text.parse())?;
    let depth: usize = arguments.next().map_or(Ok(8), |text| text.parse())?;
    let client = Client::connect(&uri, &ClientOptions::default()).await?;
    let next = Arc::new(AtomicU64::new(0));
    let start = std::time::Instant::now();
    let mut readers = Vec::new();
    for _ in 0..depth {
        let (client, next, step) = (client.clone(), Arc::clone(&next), length << 10);
        readers.push(tokio::spawn(async move {
            loop {
                let at = next.fetch_add(step, Ordering::Relaxed);
                if at >= client.size() {
                    return Ok::<(), nbd_server::ClientError>(());
                }
                let part = usize::try_from(step.min(client.size() - at)).unwrap_or(client.payload_max());
                client.read_bytes(at, part).await?;
            }
        }));
    }
    for reader in readers {
        reader.await??;
    }
    let seconds = start.elapsed().as_secs_f64();
    println!("{} bytes in {seconds:.3} s", client.size());
    client.disconnect().await;
    Ok(())
}
