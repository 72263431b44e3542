//! The calls that the `virt` crate does not wrap, each behind a safe face. The only unsafe code of this crate.
//!
//! Every pointer handed to libvirt lives until the call returns, except a subscription's closure, which libvirt owns
//! until it calls [`release`].
#![expect(unsafe_code, reason = "these functions of libvirt have no safe binding")]

use std::ffi::{CStr, CString, c_char, c_int, c_longlong, c_uint, c_void};
use std::ptr;

use virt::connect::Connect;
use virt::domain::Domain;
use virt::error::{Error, ErrorDomain, ErrorNumber};
use virt_sys as sys;

use super::error::Reason;

/// Something that happened to a domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Happening {
    /// Its life: event and detail, as libvirt numbers them.
    Lifecycle(c_int, c_int),
    /// It rebooted.
    Reboot,
    /// A disk request failed: the disk's alias, whether the domain was paused, why.
    IoError { alias: String, paused: bool, reason: String },
    /// A job on a disk (named by its target) changed its status.
    BlockJob { disk: String, status: c_int },
    /// The guest agent came or went.
    Agent { connected: bool },
    /// QEMU itself said something of a copy: the event's name and its data.
    Copy { event: String, data: String },
}

type Listener = Box<dyn Fn(String, Happening) + Send + Sync>;

/// Texts that libvirt could only misread are refused before it sees them.
fn text(words: &str) -> Result<CString, Fault> {
    CString::new(words).map_err(|_| Fault { reason: Reason::Other, message: format!("{words:?} has a zero byte") })
}

fn done(code: c_int) -> Result<c_int, Fault> {
    if code < 0 { Err(Error::last_error().into()) } else { Ok(code) }
}

/// What libvirt says when it does not do something.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// What kind of no it is.
    pub reason: Reason,
    /// In libvirt's words.
    pub message: String,
}

impl From<Error> for Fault {
    fn from(error: Error) -> Fault {
        let reason = match error.code() {
            _ if error.domain() == ErrorDomain::Rpc => Reason::Connection,
            ErrorNumber::NoDomain => Reason::NoDomain,
            ErrorNumber::DomExist => Reason::Exists,
            ErrorNumber::OperationInvalid => Reason::State,
            ErrorNumber::NoSupport
            | ErrorNumber::ConfigUnsupported
            | ErrorNumber::ArgumentUnsupported
            | ErrorNumber::OperationUnsupported => Reason::Unsupported,
            ErrorNumber::AgentUnresponsive
            | ErrorNumber::AgentUnsynced
            | ErrorNumber::AgentCommandTimeout
            | ErrorNumber::AgentCommandFailed => Reason::NoAgent,
            _ => Reason::Other,
        };
        Fault { reason, message: error.message().to_owned() }
    }
}

/// What [`unsubscribe`] needs.
#[derive(Debug)]
pub struct Subscriptions {
    events: Vec<c_int>,
    monitor: Option<c_int>,
}

/// Tells `listener` everything about all domains of a connection until the connection is closed with [`unsubscribe`].
pub fn subscribe(
    connect: &Connect,
    listener: impl Fn(String, Happening) + Send + Sync + Clone + 'static,
) -> Subscriptions {
    let mut known = Vec::new();
    // SAFETY: libvirt's generic callback type stands for the type that belongs to the event id, and it calls it with
    // that type's arguments; a function pointer of any type has the same representation.
    let callbacks = unsafe {
        [
            (sys::VIR_DOMAIN_EVENT_ID_LIFECYCLE, generic(lifecycle as *const c_void)),
            (sys::VIR_DOMAIN_EVENT_ID_REBOOT, generic(reboot as *const c_void)),
            (sys::VIR_DOMAIN_EVENT_ID_IO_ERROR_REASON, generic(io_error as *const c_void)),
            (sys::VIR_DOMAIN_EVENT_ID_BLOCK_JOB_2, generic(block_job as *const c_void)),
            (sys::VIR_DOMAIN_EVENT_ID_AGENT_LIFECYCLE, generic(agent as *const c_void)),
        ]
    };
    for (event, callback) in callbacks {
        let boxed: Box<Listener> = Box::new(Box::new(listener.clone()));
        let opaque = Box::into_raw(boxed).cast::<c_void>();
        let event = c_int::try_from(event).unwrap_or_default();
        // SAFETY: the connection is open; the callback fits the event; `opaque` is a `Box<Listener>` that only the
        // callbacks borrow and that `release` frees once, when libvirt needs it no more.
        let id = unsafe {
            sys::virConnectDomainEventRegisterAny(
                connect.as_ptr(),
                ptr::null_mut(),
                event,
                callback,
                opaque,
                Some(release),
            )
        };
        if id >= 0 {
            known.push(id);
        } else {
            // SAFETY: a registration that failed has not taken the closure.
            drop(unsafe { Box::from_raw(opaque.cast::<Listener>()) });
        }
    }
    Subscriptions { events: known, monitor: subscribe_to_copies(connect, listener) }
}

/// libvirt's own events do not say which side of a copy has failed, and why.
fn subscribe_to_copies(
    connect: &Connect,
    listener: impl Fn(String, Happening) + Send + Sync + 'static,
) -> Option<c_int> {
    let boxed: Box<Listener> = Box::new(Box::new(listener));
    let opaque = Box::into_raw(boxed).cast::<c_void>();
    // SAFETY: as in `subscribe`; the pattern ends with a zero.
    let id = unsafe {
        sys::virConnectDomainQemuMonitorEventRegister(
            connect.as_ptr(),
            ptr::null_mut(),
            c"^BLOCK_JOB_(ERROR|COMPLETED)$".as_ptr(),
            Some(copy),
            opaque,
            Some(release),
            sys::VIR_CONNECT_DOMAIN_QEMU_MONITOR_EVENT_REGISTER_REGEX,
        )
    };
    if id < 0 {
        // SAFETY: a registration that failed has not taken the closure.
        drop(unsafe { Box::from_raw(opaque.cast::<Listener>()) });
    }
    (id >= 0).then_some(id)
}

/// # Safety
///
/// `callback` must be a function of the type that belongs to the event it is registered for.
unsafe fn generic(callback: *const c_void) -> sys::virConnectDomainEventGenericCallback {
    // SAFETY: the caller's promise; both are function pointers.
    Some(unsafe {
        std::mem::transmute::<*const c_void, unsafe extern "C" fn(sys::virConnectPtr, sys::virDomainPtr, *mut c_void)>(
            callback,
        )
    })
}

/// Ends what [`subscribe`] began.
pub fn unsubscribe(connect: &Connect, subscriptions: &Subscriptions) {
    for id in &subscriptions.events {
        // SAFETY: the connection is open and the id is one of its own; one that is gone is refused.
        unsafe { sys::virConnectDomainEventDeregisterAny(connect.as_ptr(), *id) };
    }
    if let Some(id) = subscriptions.monitor {
        // SAFETY: the same.
        unsafe { sys::virConnectDomainQemuMonitorEventDeregister(connect.as_ptr(), id) };
    }
}

unsafe extern "C" fn release(opaque: *mut c_void) {
    // SAFETY: `opaque` is what `subscribe` made, and libvirt calls this once, after the last callback.
    drop(unsafe { Box::from_raw(opaque.cast::<Listener>()) });
}

/// # Safety
///
/// `domain` and `opaque` must be what libvirt calls a callback of [`subscribe`] with.
unsafe fn tell(domain: sys::virDomainPtr, opaque: *mut c_void, happening: Happening) {
    let mut uuid: [c_char; 37] = [0; 37];
    // SAFETY: the domain is valid during the callback, and the buffer has the 37 bytes that libvirt asks for.
    if unsafe { sys::virDomainGetUUIDString(domain, uuid.as_mut_ptr()) } < 0 {
        return;
    }
    // SAFETY: libvirt ends the text with a zero.
    let uuid = unsafe { words(uuid.as_ptr()) };
    // SAFETY: `opaque` is the closure, which lives until `release`.
    let listener = unsafe { &*opaque.cast::<Listener>() };
    listener(uuid, happening);
}

/// # Safety
///
/// `pointer` must be null or a text that ends with a zero.
unsafe fn words(pointer: *const c_char) -> String {
    if pointer.is_null() {
        return String::new();
    }
    // SAFETY: not null, and the caller's promise.
    unsafe { CStr::from_ptr(pointer) }.to_string_lossy().into_owned()
}

unsafe extern "C" fn lifecycle(
    _: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    event: c_int,
    detail: c_int,
    opaque: *mut c_void,
) -> c_int {
    // SAFETY: libvirt's own arguments.
    unsafe { tell(domain, opaque, Happening::Lifecycle(event, detail)) };
    0
}

unsafe extern "C" fn reboot(_: sys::virConnectPtr, domain: sys::virDomainPtr, opaque: *mut c_void) {
    // SAFETY: libvirt's own arguments.
    unsafe { tell(domain, opaque, Happening::Reboot) };
}

unsafe extern "C" fn io_error(
    _: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    _path: *const c_char,
    alias: *const c_char,
    action: c_int,
    reason: *const c_char,
    opaque: *mut c_void,
) {
    let paused = c_uint::try_from(action) == Ok(sys::VIR_DOMAIN_EVENT_IO_ERROR_PAUSE);
    // SAFETY: libvirt's own arguments; its texts end with a zero.
    unsafe {
        let happening = Happening::IoError { alias: words(alias), paused, reason: words(reason) };
        tell(domain, opaque, happening);
    }
}

unsafe extern "C" fn block_job(
    _: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    disk: *const c_char,
    _kind: c_int,
    status: c_int,
    opaque: *mut c_void,
) {
    // SAFETY: libvirt's own arguments; its texts end with a zero.
    unsafe { tell(domain, opaque, Happening::BlockJob { disk: words(disk), status }) };
}

unsafe extern "C" fn agent(
    _: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    state: c_int,
    _reason: c_int,
    opaque: *mut c_void,
) {
    let connected = c_uint::try_from(state) == Ok(sys::VIR_CONNECT_DOMAIN_EVENT_AGENT_LIFECYCLE_STATE_CONNECTED);
    // SAFETY: libvirt's own arguments.
    unsafe { tell(domain, opaque, Happening::Agent { connected }) };
}

unsafe extern "C" fn copy(
    _: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    event: *const c_char,
    _seconds: c_longlong,
    _micros: c_uint,
    data: *const c_char,
    opaque: *mut c_void,
) {
    // SAFETY: libvirt's own arguments; its texts end with a zero.
    unsafe { tell(domain, opaque, Happening::Copy { event: words(event), data: words(data) }) };
}

/// How far a job on a disk is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct JobInfo {
    /// Done.
    pub current: u64,
    /// Of how much.
    pub end: u64,
}

/// Copies a disk to what `target` describes and what exists, until it is pivoted or aborted.
pub fn block_copy(domain: &Domain, disk: &str, target: &str, bandwidth: Option<u64>) -> Result<(), Fault> {
    let (disk, target) = (text(disk)?, text(target)?);
    let mut parameters = Vec::new();
    if let Some(bandwidth) = bandwidth {
        let mut parameter = parameter();
        parameter.type_ = c_int::try_from(sys::VIR_TYPED_PARAM_ULLONG).unwrap_or_default();
        parameter.value.ul = bandwidth;
        for (to, from) in parameter.field.iter_mut().zip(b"bandwidth") {
            *to = c_char::try_from(*from).unwrap_or_default();
        }
        parameters.push(parameter);
    }
    let flags = sys::VIR_DOMAIN_BLOCK_COPY_TRANSIENT_JOB | sys::VIR_DOMAIN_BLOCK_COPY_REUSE_EXT;
    let count = c_int::try_from(parameters.len()).unwrap_or_default();
    // SAFETY: the domain is open; texts end with a zero; there are `count` parameters; all live until the call returns.
    done(unsafe {
        sys::virDomainBlockCopy(domain.as_ptr(), disk.as_ptr(), target.as_ptr(), parameters.as_mut_ptr(), count, flags)
    })
    .map(drop)
}

fn parameter() -> sys::virTypedParameter {
    sys::virTypedParameter { field: [0; 80], type_: 0, value: sys::_virTypedParameter__bindgen_ty_1 { ul: 0 } }
}

/// The counters of a disk that are whole numbers, by libvirt's names.
pub fn block_stats(domain: &Domain, disk: &str) -> Result<Vec<(String, u64)>, Fault> {
    const MANY: usize = 64;
    let disk = text(disk)?;
    let mut parameters = vec![parameter(); MANY];
    let mut count = c_int::try_from(MANY).unwrap_or_default();
    // SAFETY: the domain is open, the text ends with a zero, and there is room for `count` parameters.
    done(unsafe {
        sys::virDomainBlockStatsFlags(domain.as_ptr(), disk.as_ptr(), parameters.as_mut_ptr(), &raw mut count, 0)
    })?;
    let whole = c_int::try_from(sys::VIR_TYPED_PARAM_LLONG).unwrap_or_default();
    let known = parameters.into_iter().take(usize::try_from(count).unwrap_or(0)).filter(|one| one.type_ == whole);
    Ok(known
        .map(|one| {
            let name = one.field.iter().map(|byte| byte.cast_unsigned()).take_while(|byte| *byte != 0);
            // SAFETY: the type says that this is the field that libvirt has set.
            let value = unsafe { one.value.l };
            (String::from_utf8_lossy(&name.collect::<Vec<u8>>()).into_owned(), u64::try_from(value).unwrap_or(0))
        })
        .collect())
}

/// Changes the rate of a job, in bytes a second; 0 is without a limit.
pub fn block_job_set_speed(domain: &Domain, disk: &str, bandwidth: u64) -> Result<(), Fault> {
    let disk = text(disk)?;
    let flags = sys::VIR_DOMAIN_BLOCK_JOB_SPEED_BANDWIDTH_BYTES;
    // SAFETY: the domain is open and the text ends with a zero.
    done(unsafe { sys::virDomainBlockJobSetSpeed(domain.as_ptr(), disk.as_ptr(), bandwidth, flags) }).map(drop)
}

/// Ends a copy: `pivot` moves the guest onto it, else it is given up.
pub fn block_job_abort(domain: &Domain, disk: &str, pivot: bool) -> Result<(), Fault> {
    let disk = text(disk)?;
    let flags = if pivot { sys::VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT } else { 0 };
    // SAFETY: the domain is open and the text ends with a zero.
    done(unsafe { sys::virDomainBlockJobAbort(domain.as_ptr(), disk.as_ptr(), flags) }).map(drop)
}

/// How far the job on a disk is; `None` without one.
pub fn block_job_info(domain: &Domain, disk: &str) -> Result<Option<JobInfo>, Fault> {
    let disk = text(disk)?;
    let mut info = sys::virDomainBlockJobInfo { type_: 0, bandwidth: 0, cur: 0, end: 0 };
    // SAFETY: the domain is open, the text ends with a zero, and `info` is libvirt's own structure.
    let found = done(unsafe { sys::virDomainGetBlockJobInfo(domain.as_ptr(), disk.as_ptr(), &raw mut info, 0) })?;
    Ok((found > 0).then_some(JobInfo { current: info.cur, end: info.end }))
}

/// Freezes the guest's file systems through its agent; returns how many.
pub fn freeze(domain: &Domain) -> Result<c_int, Fault> {
    // SAFETY: the domain is open; no list of mount points means all.
    done(unsafe { sys::virDomainFSFreeze(domain.as_ptr(), ptr::null_mut(), 0, 0) })
}

/// Thaws them.
pub fn thaw(domain: &Domain) -> Result<c_int, Fault> {
    // SAFETY: the domain is open; no list of mount points means all.
    done(unsafe { sys::virDomainFSThaw(domain.as_ptr(), ptr::null_mut(), 0, 0) })
}

/// Begins a backup job.
pub fn backup_begin(domain: &Domain, backup: &str, checkpoint: Option<&str>) -> Result<(), Fault> {
    let backup = text(backup)?;
    let checkpoint = checkpoint.map(text).transpose()?;
    let checkpoint = checkpoint.as_ref().map_or(ptr::null(), |text| text.as_ptr());
    // SAFETY: the domain is open; the texts end with a zero and live until the call returns.
    done(unsafe { sys::virDomainBackupBegin(domain.as_ptr(), backup.as_ptr(), checkpoint, 0) }).map(drop)
}

/// Ends the domain's job, a backup for one.
pub fn abort_job(domain: &Domain) -> Result<(), Fault> {
    // SAFETY: the domain is open.
    done(unsafe { sys::virDomainAbortJob(domain.as_ptr()) }).map(drop)
}

/// What a running backup job is; `None` without one.
pub fn backup_description(domain: &Domain) -> Result<Option<String>, Fault> {
    // SAFETY: the domain is open.
    let description = unsafe { sys::virDomainBackupGetXMLDesc(domain.as_ptr(), 0) };
    if description.is_null() {
        let error = Error::last_error();
        return if error.code() == ErrorNumber::NoDomainBackup { Ok(None) } else { Err(error.into()) };
    }
    // SAFETY: libvirt's text ends with a zero, and is ours to free.
    let text = unsafe { words(description) };
    // SAFETY: allocated by libvirt for its caller, and not used after this.
    unsafe { libc::free(description.cast()) };
    Ok(Some(text))
}
