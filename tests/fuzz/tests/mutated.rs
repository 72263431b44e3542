//! Disks of every kind that is read, each changed at random again and again.

use lifeboat_fuzz::TARGETS;
use lifeboat_tests::{Random, rounds, seed};

/// The targets whose input is a kept disk with changes.
const DISKS: [&str; 9] = ["tables", "lvm", "ext", "fat", "exfat", "ntfs", "iso", "xfs", "btrfs"];

/// Small numbers often, so that changes stay near what is there.
fn byte(random: &mut Random) -> u8 {
    let most = match random.below(4) {
        0 => return 0xff,
        1 => 4,
        _ => 256,
    };
    u8::try_from(random.below(most)).unwrap_or(0)
}

#[test]
fn changed_disks_are_read_or_refused_and_nothing_worse() {
    let (rounds, base) = (rounds(40, 5000), seed());
    for name in DISKS {
        let target = TARGETS.iter().find(|target| target.name == name).unwrap_or_else(|| panic!("no target {name}"));
        for disk in (target.seeds)() {
            for round in 0..rounds {
                let seed = base.wrapping_add(round);
                let mut random = Random::new(seed);
                let mut input = disk.clone();
                for _ in 0..=random.below(6) {
                    input.extend(std::iter::repeat_with(|| byte(&mut random)).take(4));
                    let length = [1, 2, 4, 8, 32][random.index(5)];
                    input.push(length);
                    input.extend(std::iter::repeat_with(|| byte(&mut random)).take(length.into()));
                }
                // What fails prints this last.
                println!("{name}, disk {disk:?}, seed {seed}");
                (target.run)(&input);
            }
        }
    }
}
