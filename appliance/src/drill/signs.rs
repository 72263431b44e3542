//! What a console says about how far a guest has come, and that it will not come further.

use std::sync::LazyLock;

use regex::Regex;

/// Text that only a running kernel, or what it has started, writes.
static KERNEL: LazyLock<Regex> = LazyLock::new(|| {
    expression(concat!(
        r"(?m)^\[ *\d+\.\d{6}\] |Linux version \d|systemd\[1\]:|^Welcome to .+!|\blogin: *$",
        r"|^(FreeBSD|NetBSD|OpenBSD|SunOS) |^---<<BOOT>>---|Windows is (loading|starting)"
    ))
});

/// Text that a guest writes when it has given up, and what that means.
static GIVEN_UP: LazyLock<Vec<(Regex, &str)>> = LazyLock::new(|| {
    let sign = |text, means| (expression(text), means);
    vec![
        sign(r"Kernel panic - not syncing|Unable to mount root fs", "the kernel panicked"),
        sign(r"(?m)^(grub rescue|grub)> *$", "the boot loader stopped at its prompt"),
        sign(r"No bootable device|No bootable option or device was found", "the firmware found nothing to boot"),
        sign(
            r"(?m)dracut-initqueue.*timeout|^\(initramfs\)|You are in emergency mode|Give root password for maintenance",
            "the guest stopped in its emergency shell",
        ),
    ]
});

fn expression(text: &str) -> Regex {
    Regex::new(text).expect("written here and tried by the tests")
}

/// The line that shows a kernel, if one does.
pub fn kernel(text: &str) -> Option<String> {
    let found = KERNEL.find(text)?;
    let line = text.get(found.start()..)?.lines().next()?;
    Some(line.trim().chars().take(100).collect())
}

/// Why the guest will not come up, if it says so.
pub fn given_up(text: &str) -> Option<&'static str> {
    GIVEN_UP.iter().find(|(sign, _)| sign.is_match(text)).map(|(_, means)| *means)
}

/// Whether the guest asks for a login.
pub fn asks_for_login(text: &str) -> bool {
    text.trim_end().ends_with("login:")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_told_from_boot_loaders() {
        for text in [
            "[    0.000000] Linux version 6.1.0-44-cloud-amd64",
            "loading\n[   12.345678] EXT4-fs (vda1): mounted",
            "Welcome to \u{1b}Debian GNU/Linux 12!",
            "\nweb01 login: ",
            "systemd[1]: Set hostname",
            "FreeBSD 14.1-RELEASE releng/14.1",
        ] {
            assert!(kernel(text).is_some(), "{text}");
        }
        for text in ["", "GNU GRUB  version 2.06", "Loading Linux 6.1 ...\nLoading initial ramdisk ...", "SeaBIOS"] {
            assert_eq!(kernel(text), None, "{text}");
        }
    }

    #[test]
    fn a_guest_that_has_given_up_says_so() {
        let means = |text| given_up(text).unwrap_or("nothing");
        assert_eq!(means("[ 1.0] Kernel panic - not syncing: VFS: Unable to mount"), "the kernel panicked");
        assert_eq!(means("x\ngrub rescue> "), "the boot loader stopped at its prompt");
        assert_eq!(
            means("error: unknown filesystem.\n\n\n  Minimal BASH\n\ngrub> "),
            "the boot loader stopped at its prompt"
        );
        assert_eq!(means("No bootable device."), "the firmware found nothing to boot");
        assert_eq!(means("\n(initramfs) "), "the guest stopped in its emergency shell");
        assert_eq!(means("GNU GRUB, type grub> for a prompt\nweb01 login: "), "nothing");
        assert!(asks_for_login("web01 login: ") && !asks_for_login("Last login: today"));
    }
}
