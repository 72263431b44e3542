//! UEFI: where distributions put OVMF, and the machine's own copy of its variables.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::{fs, io};

/// Code and variable template, in the order they are tried: 4 MiB builds first, never the secure-boot ones, which
/// need a machine with SMM.
const PLACES: &[(&str, &str)] = &[
    ("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"), // Debian, Ubuntu
    ("/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/OVMF/OVMF_VARS.fd"),       // older Debian, Fedora's links
    ("/usr/share/edk2/ovmf/OVMF_CODE.fd", "/usr/share/edk2/ovmf/OVMF_VARS.fd"), // Fedora, RHEL
    ("/usr/share/edk2/x64/OVMF_CODE.4m.fd", "/usr/share/edk2/x64/OVMF_VARS.4m.fd"), // Arch
    ("/usr/share/edk2-ovmf/x64/OVMF_CODE.fd", "/usr/share/edk2-ovmf/x64/OVMF_VARS.fd"), // older Arch
    ("/usr/share/qemu/ovmf-x86_64-code.bin", "/usr/share/qemu/ovmf-x86_64-vars.bin"), // openSUSE
    ("/usr/share/edk2-ovmf/OVMF_CODE.fd", "/usr/share/edk2-ovmf/OVMF_VARS.fd"), // Gentoo
];
/// No OVMF build's variables are larger; a template beyond it is something else.
const MAX_TEMPLATE: u64 = 16 * 1024 * 1024;

/// Why a machine cannot have UEFI.
#[derive(Debug, thiserror::Error)]
pub enum FirmwareError {
    /// Not installed.
    #[error(
        "no UEFI firmware found: install OVMF (Debian and Ubuntu: ovmf, Fedora and RHEL: edk2-ovmf, Arch: edk2-ovmf, openSUSE: qemu-ovmf-x86_64)"
    )]
    Missing,
    /// The template is not one.
    #[error("{} is no UEFI variable template: it has {size} bytes", path.display())]
    Template {
        /// The template.
        path: PathBuf,
        /// Its size.
        size: u64,
    },
    /// The machine's variables go with another build of the firmware.
    #[error(
        "no UEFI firmware on this host goes with {}, which has {size} bytes (found: {found})", path.display()
    )]
    Variables {
        /// The machine's variables.
        path: PathBuf,
        /// Their size.
        size: u64,
        /// What is there, with the sizes of their variables.
        found: String,
    },
    /// The copy could not be made.
    #[error("cannot prepare UEFI variables {}", path.display())]
    Io {
        /// The file at fault.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Finds the firmware and makes sure the machine has variables of its own, which are kept if they exist.
/// Returns the path of the code.
pub fn prepare(variables: &Path) -> Result<PathBuf, FirmwareError> {
    let places = PLACES.iter().map(|(code, template)| (Path::new(code), Path::new(template)));
    prepare_from(places, variables)
}

fn prepare_from<'a>(
    places: impl Iterator<Item = (&'a Path, &'a Path)>,
    variables: &Path,
) -> Result<PathBuf, FirmwareError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| FirmwareError::Io { path, source }
    };
    let mut places = places.filter(|(code, template)| code.is_file() && template.is_file()).peekable();
    let (first, template) = *places.peek().ok_or(FirmwareError::Missing)?;
    let size = match fs::metadata(variables) {
        Ok(own) => own.len(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            copy(template, variables)?;
            return Ok(first.to_owned());
        }
        Err(source) => return Err(failed(variables)(source)),
    };
    // Code that was built for a store of another size would not find its variables.
    let mut found = Vec::new();
    for (code, template) in places {
        let there = fs::metadata(template).map_err(failed(template))?.len();
        if there == size {
            return Ok(code.to_owned());
        }
        found.push(format!("{} with {there}", code.display()));
    }
    Err(FirmwareError::Variables { path: variables.to_owned(), size, found: found.join(", ") })
}

/// A machine's own variables from a template. Written beside and renamed, so that a crash leaves no half file that would
/// be kept for ever.
fn copy(template: &Path, variables: &Path) -> Result<(), FirmwareError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| FirmwareError::Io { path, source }
    };
    let size = fs::metadata(template).map_err(failed(template))?.len();
    if size == 0 || size > MAX_TEMPLATE {
        return Err(FirmwareError::Template { path: template.to_owned(), size });
    }
    let bytes = fs::read(template).map_err(failed(template))?;
    let temporary = variables.with_extension("new");
    let written = (|| {
        let mut file = fs::File::create(&temporary)?;
        file.write_all(&bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, variables)
    })();
    written.map_err(failed(variables))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_complete_pair_is_used_and_variables_are_kept() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let at = |name: &str| folder.path().join(name);
        fs::write(at("lone-code"), b"c").expect("writable");
        fs::write(at("code"), b"c").expect("writable");
        fs::write(at("vars"), b"template").expect("writable");
        let (lone, code, vars, none) = (at("lone-code"), at("code"), at("vars"), at("none"));
        let places = || [(lone.as_path(), none.as_path()), (code.as_path(), vars.as_path())].into_iter();

        let mine = at("mine");
        assert_eq!(prepare_from(places(), &mine).expect("prepared"), code);
        assert_eq!(fs::read(&mine).expect("copied"), b"template");
        fs::write(&mine, b"bootnext").expect("writable");
        assert_eq!(prepare_from(places(), &mine).expect("prepared"), code);
        assert_eq!(fs::read(&mine).expect("kept"), b"bootnext");
    }

    #[test]
    fn variables_choose_the_firmware_they_were_made_by() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let at = |name: &str| folder.path().join(name);
        for (name, bytes) in [("4m", &b"c"[..]), ("4m-vars", b"1234"), ("2m", b"c"), ("2m-vars", b"12"), ("own", b"ab")]
        {
            fs::write(at(name), bytes).expect("writable");
        }
        let (large, large_vars, small, small_vars) = (at("4m"), at("4m-vars"), at("2m"), at("2m-vars"));
        let places = || [(large.as_path(), large_vars.as_path()), (small.as_path(), small_vars.as_path())].into_iter();
        assert_eq!(prepare_from(places(), &at("own")).expect("one fits"), small);
        fs::write(at("own"), b"abc").expect("writable");
        let error = prepare_from(places(), &at("own")).expect_err("none fits").to_string();
        assert!(error.contains("which has 3 bytes") && error.contains("4m with 4, "), "{error}");
    }

    #[test]
    fn missing_firmware_names_the_package() {
        let error = prepare_from(std::iter::empty(), Path::new("/nowhere")).expect_err("nothing is installed");
        assert!(error.to_string().contains("edk2-ovmf"));
    }
}
