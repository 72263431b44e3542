//! [`LiveDisk`]: a recovery's disk as its guest sees it, over the overlay or, after a cutover, over production storage.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use bytes::BytesMut;
use nbd_server::export::{BlockSize, ContextExtent, Export, ExportError, Extent, ExtentKind, Piece, ZeroMode};

use super::gate::{Closed, Gate};
use super::regions::{RegionSet, Regions, touched};
use super::target::Production;
use crate::exports::{BLOCK_SIZE, CHANGED_CONTEXT, OverlayExport};
use crate::frozen::Frozen;

/// A disk that can change its backend while it is served.
#[derive(Debug)]
pub struct LiveDisk {
    size: u64,
    gate: Gate,
    backend: RwLock<Backend>,
    /// The guest was moved off it by others.
    left_behind: AtomicBool,
    /// Told of every change while the disk is being rehydrated.
    regions: RwLock<Option<Arc<Regions>>>,
    /// Told of every change before it is made, while the disk is being committed.
    frozen: RwLock<Option<Arc<Frozen>>>,
    /// What the guest has read since the disk was opened: copied first.
    read: RegionSet,
    latency: Latency,
}

/// Where the bytes are. Cheap to clone.
#[derive(Debug, Clone)]
pub enum Backend {
    /// The recovery point and the overlay above it.
    Overlay(Arc<OverlayExport>),
    /// Production storage, after the cutover.
    Production(Arc<Served>),
}

/// Production storage that is served.
#[derive(Debug)]
pub struct Served {
    production: Arc<dyn Production>,
    size: u64,
    description: String,
    poisoned: AtomicBool,
}

/// What the guest's requests take and change: sums that a reader takes away.
#[derive(Debug, Default)]
struct Latency {
    micros: AtomicU64,
    requests: AtomicU64,
    changed: AtomicU64,
    /// Requests that changed something, never taken away.
    changes: AtomicU64,
}

impl LiveDisk {
    /// A disk over its overlay.
    pub fn new(overlay: OverlayExport) -> LiveDisk {
        let size = overlay.size();
        LiveDisk::over(size, Backend::Overlay(Arc::new(overlay)))
    }

    /// A disk that was cut over before.
    pub fn cut_over(size: u64, production: Arc<dyn Production>, description: String) -> LiveDisk {
        LiveDisk::over(size, Backend::Production(Arc::new(Served::new(production, size, description))))
    }

    fn over(size: u64, backend: Backend) -> LiveDisk {
        LiveDisk {
            size,
            gate: Gate::default(),
            backend: RwLock::new(backend),
            left_behind: AtomicBool::new(false),
            regions: RwLock::default(),
            frozen: RwLock::default(),
            read: RegionSet::new(size),
            latency: Latency::default(),
        }
    }

    /// The guest no longer uses this disk: what its overlay holds is not what the guest sees.
    pub fn leave_behind(&self) {
        self.left_behind.store(true, Ordering::Release);
    }

    /// The overlay, as long as it is what the guest sees.
    pub fn overlay(&self) -> Option<Arc<OverlayExport>> {
        match self.backend() {
            _ if self.left_behind.load(Ordering::Acquire) => None,
            Backend::Overlay(overlay) => Some(overlay),
            Backend::Production(_) => None,
        }
    }

    /// Has every change from now on noted in `regions`, or none any more.
    pub fn track(&self, regions: Option<Arc<Regions>>) {
        let closed = self.gate.close(); // a change in flight would be noted nowhere
        *self.regions.write().unwrap_or_else(PoisonError::into_inner) = regions;
        drop(closed);
    }

    /// Waits for the requests in flight and holds later ones as long as the answer lives.
    pub fn close(&self) -> Closed<'_> {
        self.gate.close()
    }

    /// Serves production storage from now on. Only while the gate is closed.
    pub fn switch(&self, _closed: &Closed<'_>, production: Arc<dyn Production>, description: String) {
        let served = Backend::Production(Arc::new(Served::new(production, self.size, description)));
        *self.backend.write().unwrap_or_else(PoisonError::into_inner) = served;
        *self.regions.write().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Keeps what the disk holds now readable in `frozen`, whatever the guest writes, until [`LiveDisk::thaw`].
    pub fn freeze(&self, _closed: &Closed<'_>, frozen: Arc<Frozen>) {
        *self.frozen.write().unwrap_or_else(PoisonError::into_inner) = Some(frozen);
    }

    /// The end of that. A change in flight may still be told to it.
    pub fn thaw(&self) {
        *self.frozen.write().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// The disk as it was when it was frozen, while it is.
    pub fn frozen(&self) -> Option<Arc<Frozen>> {
        self.frozen.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The regions that the guest has read.
    pub fn recently_read(&self) -> &RegionSet {
        &self.read
    }

    /// The mean time of the guest's requests since this was asked last, if there were any.
    pub fn take_latency(&self) -> Option<Duration> {
        let requests = self.latency.requests.swap(0, Ordering::Relaxed);
        let micros = self.latency.micros.swap(0, Ordering::Relaxed);
        (requests > 0).then(|| Duration::from_micros(micros / requests))
    }

    /// The bytes that the guest has changed since this was asked last.
    pub fn take_changed(&self) -> u64 {
        self.latency.changed.swap(0, Ordering::Relaxed)
    }

    /// How many requests have changed something since the disk was opened.
    pub fn changes(&self) -> u64 {
        self.latency.changes.load(Ordering::Relaxed)
    }

    fn backend(&self) -> Backend {
        self.backend.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn note_read(&self, offset: u64, length: u64) {
        for region in touched(offset, length) {
            if !self.read.contains(region) {
                self.read.insert(region);
            }
        }
    }

    /// Does a request inside the gate.
    fn inside<T>(&self, work: impl FnOnce(&dyn Export) -> T) -> T {
        let began = Instant::now();
        let inside = self.gate.enter();
        let result = match self.backend() {
            Backend::Overlay(overlay) => work(&*overlay),
            Backend::Production(served) => work(&*served),
        };
        drop(inside);
        let micros = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.latency.micros.fetch_add(micros, Ordering::Relaxed);
        self.latency.requests.fetch_add(1, Ordering::Relaxed);
        result
    }

    /// Does a change inside the gate, after what it replaces is put aside if the disk is frozen, and notes it before it
    /// is answered. A failed one may have changed something.
    fn change<T>(&self, offset: u64, length: u64, work: impl FnOnce(&dyn Export) -> T) -> T {
        self.inside(|export| {
            if let Some(frozen) = self.frozen() {
                frozen.before_change(offset, length);
            }
            let result = work(export);
            self.note_change(offset, length);
            result
        })
    }

    fn note_change(&self, offset: u64, length: u64) {
        self.latency.changed.fetch_add(length, Ordering::Relaxed);
        self.latency.changes.fetch_add(1, Ordering::Relaxed);
        if let Some(regions) = &*self.regions.read().unwrap_or_else(PoisonError::into_inner) {
            regions.changed(offset, length);
        }
    }
}

impl Export for LiveDisk {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_only(&self) -> bool {
        false
    }

    fn description(&self) -> String {
        match self.backend() {
            Backend::Overlay(overlay) => overlay.description(),
            Backend::Production(served) => served.description.clone(),
        }
    }

    fn block_size(&self) -> BlockSize {
        BLOCK_SIZE
    }

    fn read_resident(&self, offset: u64, length: u32, out: &mut Vec<Piece>) -> bool {
        // Called where nothing may wait: a closed gate is for `read` to wait at.
        let Some(_inside) = self.gate.try_enter() else { return false };
        self.note_read(offset, length.into());
        match &*self.backend.read().unwrap_or_else(PoisonError::into_inner) {
            Backend::Overlay(overlay) => overlay.read_resident(offset, length, out),
            Backend::Production(_) => false,
        }
    }

    fn read(&self, offset: u64, length: u32, out: &mut Vec<Piece>) -> Result<(), ExportError> {
        self.note_read(offset, length.into());
        self.inside(|export| export.read(offset, length, out))
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), ExportError> {
        self.change(offset, data.len() as u64, |export| export.write(offset, data))
    }

    fn write_resident(&self, offset: u64, data: &[u8]) -> Option<Result<(), ExportError>> {
        let _inside = self.gate.try_enter()?;
        if self.frozen().is_some_and(|frozen| frozen.concerns(offset, data.len() as u64)) {
            return None; // what it replaces is put aside first, where that may take a while
        }
        let result = match &*self.backend.read().unwrap_or_else(PoisonError::into_inner) {
            Backend::Overlay(overlay) => overlay.write_resident(offset, data)?,
            Backend::Production(_) => return None,
        };
        self.note_change(offset, data.len() as u64);
        Some(result)
    }

    fn write_zeroes(&self, offset: u64, length: u64, mode: ZeroMode) -> Result<(), ExportError> {
        self.change(offset, length, |export| export.write_zeroes(offset, length, mode))
    }

    fn trim(&self, offset: u64, length: u64) -> Result<(), ExportError> {
        self.change(offset, length, |export| export.trim(offset, length))
    }

    fn flush(&self) -> Result<(), ExportError> {
        self.inside(|export| export.flush())
    }

    fn cache(&self, offset: u64, length: u64) -> Result<(), ExportError> {
        self.inside(|export| export.cache(offset, length))
    }

    fn extents(&self, offset: u64, length: u64, limit: usize) -> Result<Vec<Extent>, ExportError> {
        self.inside(|export| export.extents(offset, length, limit))
    }

    fn fast_zeroes(&self) -> bool {
        true
    }

    fn contexts(&self) -> Vec<String> {
        vec![CHANGED_CONTEXT.to_owned()]
    }

    fn context_extents(
        &self,
        context: &str,
        offset: u64,
        length: u64,
        limit: usize,
    ) -> Result<Vec<ContextExtent>, ExportError> {
        self.inside(|export| export.context_extents(context, offset, length, limit))
    }
}

impl Served {
    fn new(production: Arc<dyn Production>, size: u64, description: String) -> Served {
        Served { production, size, description, poisoned: AtomicBool::new(false) }
    }

    fn tell<T>(&self, operation: &str, result: io::Result<T>) -> Result<T, ExportError> {
        result.map_err(|error| {
            tracing::error!(export = %self.description, operation, %error, "production storage failed");
            match error.kind() {
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ExportError::NoSpace,
                _ => ExportError::Io,
            }
        })
    }
}

impl Export for Served {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_only(&self) -> bool {
        false
    }

    fn description(&self) -> String {
        self.description.clone()
    }

    fn block_size(&self) -> BlockSize {
        BLOCK_SIZE
    }

    fn read(&self, offset: u64, length: u32, out: &mut Vec<Piece>) -> Result<(), ExportError> {
        let mut bytes = BytesMut::zeroed(length as usize);
        self.tell("read", self.production.read_at(offset, &mut bytes))?;
        out.push(Piece::Data(bytes.freeze()));
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), ExportError> {
        self.tell("write", self.production.write_at(offset, data))
    }

    fn write_zeroes(&self, offset: u64, length: u64, mode: ZeroMode) -> Result<(), ExportError> {
        self.tell("write zeroes", self.production.zero(offset, length, mode))
    }

    fn trim(&self, offset: u64, length: u64) -> Result<(), ExportError> {
        self.tell("trim", self.production.zero(offset, length, ZeroMode::MayPunch))
    }

    /// A sync that failed may have lost what was written before it; no later one may say otherwise.
    fn flush(&self) -> Result<(), ExportError> {
        if self.poisoned.load(Ordering::Acquire) {
            return Err(ExportError::Io);
        }
        self.tell("flush", self.production.sync()).inspect_err(|_| self.poisoned.store(true, Ordering::Release))
    }

    fn cache(&self, _offset: u64, _length: u64) -> Result<(), ExportError> {
        Ok(())
    }

    fn extents(&self, mut offset: u64, length: u64, limit: usize) -> Result<Vec<Extent>, ExportError> {
        let end = offset + length;
        let mut out = Vec::new();
        while offset < end && out.len() < limit.max(1) {
            let (length, hole) = self.tell("block status", self.production.extent(offset, end - offset))?;
            let kind = if hole { ExtentKind::Hole } else { ExtentKind::Data };
            out.push(Extent { length: length.max(1), kind });
            offset += length.max(1);
        }
        Ok(out)
    }

    fn context_extents(
        &self,
        context: &str,
        _offset: u64,
        length: u64,
        _limit: usize,
    ) -> Result<Vec<ContextExtent>, ExportError> {
        match context {
            // What was written since the recovery point is no longer told apart.
            CHANGED_CONTEXT => Ok(vec![ContextExtent { length, flags: 1 }]),
            _ => Err(ExportError::NotSupported),
        }
    }
}
