//! Fences around a library that asserts what a hostile image can break.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Runs the library: a panic in it becomes an error of this image. Its locks are released by the unwinding; what reads
/// is left whole, what writes is given up by its caller.
pub(crate) fn guarded<T>(work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
        let message = format!("the image cannot be made sense of: {}", text.unwrap_or("an assertion failed"));
        Err(io::Error::new(io::ErrorKind::InvalidData, message))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_an_error() {
        let error = guarded(|| -> io::Result<()> { panic!("unaligned cluster") }).expect_err("it panicked");
        assert!(error.to_string().contains("unaligned cluster"), "{error}");
        assert_eq!(guarded(|| Ok(7)).expect("no panic"), 7);
    }
}
