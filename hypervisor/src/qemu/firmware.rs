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
    mut places: impl Iterator<Item = (&'a Path, &'a Path)>,
    variables: &Path,
) -> Result<PathBuf, FirmwareError> {
    let (code, template) =
        places.find(|(code, template)| code.is_file() && template.is_file()).ok_or(FirmwareError::Missing)?;
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| FirmwareError::Io { path, source }
    };
    if !variables.try_exists().map_err(failed(variables))? {
        let size = fs::metadata(template).map_err(failed(template))?.len();
        if size == 0 || size > MAX_TEMPLATE {
            return Err(FirmwareError::Template { path: template.to_owned(), size });
        }
        let bytes = fs::read(template).map_err(failed(template))?;
        // Written beside and renamed, so that a crash leaves no half file that would be kept for ever.
        let temporary = variables.with_extension("new");
        let written = (|| {
            let mut file = fs::File::create(&temporary)?;
            file.write_all(&bytes)?;
            file.sync_all()?;
            fs::rename(&temporary, variables)
        })();
        written.map_err(failed(variables))?;
    }
    Ok(code.to_owned())
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
        fs::write(&mine, b"boot order of the guest").expect("writable");
        prepare_from(places(), &mine).expect("prepared");
        assert_eq!(fs::read(&mine).expect("kept"), b"boot order of the guest");
    }

    #[test]
    fn missing_firmware_names_the_package() {
        let error = prepare_from(std::iter::empty(), Path::new("/nowhere")).expect_err("nothing is installed");
        assert!(error.to_string().contains("edk2-ovmf"));
    }
}
