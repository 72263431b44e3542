//! [`ExportName`]: what the protocol allows as the name of an export.

use std::fmt;
use std::str::FromStr;

/// Longest name in bytes; the protocol's own limit for strings.
pub const MAX_NAME: usize = 4096;

/// The name of an export: UTF-8, at most [`MAX_NAME`] bytes, no NUL. The empty name asks for the default export.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct ExportName(String);

/// Why a string is not the name of an export.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Longer than the protocol allows.
    #[error("an export name has at most {MAX_NAME} bytes, this one has {0}")]
    TooLong(usize),
    /// Holds a NUL character.
    #[error("an export name must not hold a NUL character")]
    Nul,
    /// Not UTF-8.
    #[error("an export name must be UTF-8")]
    NotUtf8,
}

impl ExportName {
    /// Checks a string.
    pub fn new(name: impl Into<String>) -> Result<ExportName, NameError> {
        let name = name.into();
        if name.len() > MAX_NAME {
            return Err(NameError::TooLong(name.len()));
        }
        if name.contains('\0') {
            return Err(NameError::Nul);
        }
        Ok(ExportName(name))
    }

    /// Checks bytes from the wire; their number is bounded before anything is copied.
    pub fn from_wire(bytes: &[u8]) -> Result<ExportName, NameError> {
        if bytes.len() > MAX_NAME {
            return Err(NameError::TooLong(bytes.len()));
        }
        ExportName::new(std::str::from_utf8(bytes).map_err(|_| NameError::NotUtf8)?)
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether this asks for the default export.
    pub fn is_default(&self) -> bool {
        self.0.is_empty()
    }
}

impl fmt::Display for ExportName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for ExportName {
    type Err = NameError;
    fn from_str(text: &str) -> Result<ExportName, NameError> {
        ExportName::new(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_bounded_and_free_of_nul() {
        assert!(ExportName::new("").expect("the default").is_default());
        assert_eq!(ExportName::new("web01/disk0").expect("plain").as_str(), "web01/disk0");
        assert!(ExportName::new("x".repeat(MAX_NAME)).is_ok());
        assert_eq!(ExportName::new("x".repeat(MAX_NAME + 1)), Err(NameError::TooLong(MAX_NAME + 1)));
        assert_eq!(ExportName::new("a\0b"), Err(NameError::Nul));
        assert_eq!(ExportName::from_wire(&[0xff, 0xfe]), Err(NameError::NotUtf8));
    }
}
