use super::*;

fn bytes(folder: &SimFolder, path: &str) -> Option<Vec<u8>> {
    let disk = folder.open_read(Path::new(path)).ok()?;
    let mut bytes = vec![0; usize::try_from(disk.len().unwrap()).unwrap()];
    disk.read_at(0, &mut bytes).unwrap();
    Some(bytes)
}

/// A folder with one synced file of 16 sectors of ones.
fn prepared(seed: u64) -> (SimFolder, Arc<dyn Disk>) {
    let folder = SimFolder::new(seed);
    let disk = folder.create(Path::new("f")).unwrap();
    disk.write_at(0, &[1; 8192]).unwrap();
    disk.sync().unwrap();
    folder.sync_dir(Path::new("")).unwrap();
    (folder, disk)
}

#[test]
fn a_simulated_folder_passes_the_conformance_suite() {
    crate::disk::conformance::check(&SimFolder::new(1));
}

#[test]
fn synced_state_is_always_kept_and_unsynced_bytes_are_old_or_new_by_the_sector() {
    let (mut kept, mut lost, mut torn, mut reordered) = (0, 0, 0, 0);
    for seed in 0..200 {
        let (folder, disk) = prepared(seed);
        disk.write_at(0, &[2; 4096]).unwrap();
        disk.write_at(4096, &[3; 4096]).unwrap();
        let after = bytes(&folder.after_crash(), "f").unwrap();
        assert_eq!(after.len(), 8192);
        let mut sectors = Vec::new();
        for (index, sector) in after.chunks(512).enumerate() {
            assert!(sector.iter().all(|byte| *byte == sector[0]), "seed {seed}: a sector is never torn");
            assert!(sector[0] == 1 || sector[0] == if index < 8 { 2 } else { 3 }, "seed {seed}");
            sectors.push(sector[0] != 1);
        }
        kept += u32::from(sectors.iter().all(|new| *new));
        lost += u32::from(sectors.iter().all(|new| !*new));
        torn += u32::from(sectors[..8].contains(&true) && sectors[..8].contains(&false));
        reordered += u32::from(sectors[8..].iter().all(|new| *new) && !sectors[..8].iter().all(|new| *new));
    }
    assert!(kept > 10 && lost > 10 && torn > 10 && reordered > 5, "{kept} {lost} {torn} {reordered}");
}

#[test]
fn names_without_a_directory_sync_may_vanish_and_synced_ones_stay() {
    let (mut created, mut renamed, mut removed) = ([0; 2], [0; 2], [0; 2]);
    for seed in 0..100 {
        let (folder, _) = prepared(seed);
        folder.create(Path::new("gone")).unwrap();
        folder.create(Path::new("old")).unwrap().write_at(0, b"x").unwrap();
        folder.open_exclusive(Path::new("old")).unwrap().sync().unwrap();
        folder.sync_dir(Path::new("")).unwrap();
        folder.rename(Path::new("old"), Path::new("new")).unwrap();
        folder.remove(Path::new("gone")).unwrap();
        let disk = folder.create(Path::new("fresh")).unwrap();
        disk.write_at(0, b"content").unwrap();
        disk.sync().unwrap();

        let after = folder.after_crash();
        assert!(bytes(&after, "f").is_some());
        let (old, new) = (bytes(&after, "old"), bytes(&after, "new"));
        assert!(old.is_some() != new.is_some(), "seed {seed}: a rename is one step");
        assert_eq!(old.or(new.clone()).unwrap(), b"x");
        renamed[usize::from(new.is_some())] += 1;
        removed[usize::from(bytes(&after, "gone").is_none())] += 1;
        let fresh = bytes(&after, "fresh");
        assert!(fresh.as_ref().is_none_or(|bytes| bytes == b"content"));
        created[usize::from(fresh.is_some())] += 1;
    }
    for count in created.into_iter().chain(renamed).chain(removed) {
        assert!(count > 20, "{created:?} {renamed:?} {removed:?}");
    }
}

#[test]
fn the_machine_is_off_from_the_operation_of_the_power_cut_on() {
    let (counted, _) = prepared(3);
    assert_eq!(counted.operations(), 4);
    let mut outcomes = std::collections::BTreeSet::new();
    for cut in 0..4 {
        for seed in 0..40 {
            let folder = SimFolder::new(seed).crash_at(cut);
            let disk = folder.create(Path::new("f"));
            assert_eq!(disk.is_err(), cut == 0);
            if let Ok(disk) = &disk {
                assert_eq!(disk.write_at(0, &[1; 8192]).is_err(), cut <= 1);
                assert_eq!(disk.sync().is_err(), cut <= 2);
                assert!(folder.sync_dir(Path::new("")).is_err());
                assert!(disk.read_at(0, &mut [0]).is_err(), "a machine that is off does not read");
            }
            assert!(folder.is_off() && folder.list(Path::new("")).is_err());
            let after = folder.after_crash();
            assert_eq!(after.operations(), 0);
            let found = bytes(&after, "f");
            assert_eq!(found, bytes(&folder.after_crash(), "f"), "asked twice, the same outcome");
            outcomes.insert((cut, found.is_some(), found.is_some_and(|bytes| bytes == [1; 8192])));
        }
    }
    // Also what was hit by the cut may have happened in full.
    assert!(outcomes.contains(&(0, true, false)) && outcomes.contains(&(0, false, false)));
    assert!(outcomes.contains(&(1, true, true)) && outcomes.contains(&(1, true, false)));
    assert!(outcomes.contains(&(3, true, true)) && !outcomes.contains(&(3, true, false)));
}

#[test]
fn a_failed_sync_forgets_what_it_did_not_write() {
    let mut forgotten = 0;
    for seed in 0..50 {
        let (folder, disk) = prepared(seed);
        let folder = folder.clone().fail_sync_at(folder.syncs());
        disk.write_at(0, &[2; 8192]).unwrap();
        disk.sync().unwrap_err();
        assert_eq!(bytes(&folder, "f").unwrap(), [2; 8192], "the cache still shows it");
        disk.sync().unwrap();
        forgotten += u32::from(bytes(&folder.after_crash(), "f").unwrap() != [2; 8192]);
    }
    assert!(forgotten > 10);
}

#[test]
fn full_storage_takes_what_fits_and_works_again_with_room() {
    let (folder, disk) = prepared(1);
    let folder = folder.full_after(8192);
    disk.write_at(0, &[4; 8192]).unwrap();
    disk.write_at(8192, &[5; 4096]).unwrap();
    assert_eq!(disk.write_at(12288, &[6; 8192]).unwrap_err().kind(), io::ErrorKind::StorageFull);
    assert_eq!(disk.len().unwrap(), 16384, "as much as fitted was written");
    disk.punch(0, 4096).unwrap();
    disk.write_at(16384, &[7; 4096]).unwrap();
    assert!(disk.write_at(20480, &[8]).is_err());
    folder.heal();
    disk.write_at(20480, &[8]).unwrap();
    let folder = folder.fail_reads();
    assert!(disk.read_at(0, &mut [0]).is_err());
    folder.heal();
    disk.read_at(0, &mut [0]).unwrap();
}

#[test]
fn locks_are_free_after_a_power_cut() {
    let (folder, _) = prepared(1);
    let held = folder.open_exclusive(Path::new("f")).unwrap();
    assert!(folder.open_exclusive(Path::new("f")).is_err());
    let after = folder.after_crash();
    after.open_exclusive(Path::new("f")).unwrap();
    assert!(held.write_at(0, b"x").is_err(), "a handle from before the cut is dead");
}

#[test]
fn a_killed_process_leaves_everything_it_wrote_and_a_later_power_cut_still_decides() {
    let mut lost = 0;
    for seed in 0..20 {
        let (folder, disk) = prepared(seed);
        let boot = folder.boot_id();
        let _held = folder.open_exclusive(Path::new("f")).unwrap();
        disk.write_at(0, &[2; 8192]).unwrap();
        folder.rename(Path::new("f"), Path::new("g")).unwrap();
        let killed = folder.after_kill();
        assert!(folder.is_off() && disk.sync().is_err());
        assert_eq!(killed.boot_id(), boot);
        assert_eq!(bytes(&killed, "g").unwrap(), [2; 8192]);
        drop(killed.open_exclusive(Path::new("g")).unwrap());
        let after = killed.after_crash();
        assert_ne!(after.boot_id(), boot);
        lost += u32::from(bytes(&after, "g").is_none_or(|bytes| bytes != [2; 8192]));
        killed.after_kill().after_kill().open_exclusive(Path::new("g")).unwrap().sync().unwrap();
    }
    assert!(lost > 5);
}
