//! File systems made by their own tools, read here, and compared with what they were made from.
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "tests")]

mod ext;
mod fat;
mod hostile;
mod iso;
mod linux;
mod support;
mod volumes;
mod windows;
