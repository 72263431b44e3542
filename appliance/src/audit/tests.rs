use super::*;

fn ask(number: u64) -> Event {
    Event::Asked { who: "owner".into(), from: None, what: format!("POST /api/v1/{number}") }
}

fn log_of(path: &Path, records: u64) -> Audit {
    let audit = Audit::open(path.to_owned());
    for number in 1..=records {
        assert_eq!(audit.append(ask(number)).unwrap(), number);
    }
    audit
}

#[test]
fn a_record_has_these_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("audit");
    log_of(&path, 1);
    let text = std::fs::read_to_string(&path).unwrap();
    let (hash, json) = text.trim_end().split_once(' ').unwrap();
    assert!(json.starts_with("{\"number\":1,\"time\":\""), "{json}");
    assert!(json.ends_with("\"event\":\"asked\",\"who\":\"owner\",\"what\":\"POST /api/v1/1\"}"), "{json}");
    let expected = blake3::hash(&[&[0; 32], json.as_bytes()].concat());
    assert_eq!(hash, expected.to_hex().as_str());
}

#[test]
fn the_chain_goes_on_after_a_reopen() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("audit");
    log_of(&path, 3);
    let audit = Audit::open(path);
    let noted = audit.verify(None).unwrap().head;
    assert_eq!(audit.append(ask(4)).unwrap(), 4);
    let result = audit.verify(Some(&noted)).unwrap();
    assert!(result.ok && result.head_found == Some(true) && result.records == 4, "{result:?}");
    let missing = audit.verify(Some(&"ab".repeat(32))).unwrap();
    assert!(!missing.ok && missing.head_found == Some(false));
    assert_eq!(audit.verify(Some("zz")).unwrap_err().kind, Kind::Usage);
    let numbers = |after, limit| {
        let listed = audit.list(&AuditQuery { after, limit }).unwrap();
        listed.iter().map(|chained| chained.record.number).collect::<Vec<_>>()
    };
    assert_eq!(numbers(None, None), [1, 2, 3, 4]);
    assert_eq!(numbers(None, Some(2)), [3, 4]);
    assert_eq!(numbers(Some(1), Some(2)), [2, 3]);
    assert_eq!(numbers(Some(4), None), [0; 0]);
    assert!(audit.list(&AuditQuery { after: None, limit: Some(0) }).is_err());
}

#[test]
fn a_power_cut_at_every_byte_keeps_whole_records_and_tells_of_the_torn_one() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("audit");
    log_of(&path, 3);
    let good = std::fs::read(&path).unwrap();
    // In the last record, and a few others: each cut syncs, and disks are slow.
    let last = good[..good.len() - 1].iter().rposition(|byte| *byte == b'\n').unwrap() + 1;
    let cuts = [0, 1, 70].into_iter().chain((last - 1..=good.len()).step_by(7)).chain([good.len() - 1, good.len()]);
    for cut in cuts {
        std::fs::write(&path, &good[..cut]).unwrap();
        let whole = good[..cut].iter().filter(|byte| **byte == b'\n').count() as u64;
        let torn = cut > 0 && good[cut - 1] != b'\n';
        let audit = Audit::open(path.clone());
        let result = audit.verify(None).unwrap();
        assert!(result.ok, "cut {cut}: {result:?}");
        assert_eq!((result.records, result.torn_ends), (whole + u64::from(torn), u64::from(torn)), "cut {cut}");
        assert_eq!(audit.append(ask(9)).unwrap(), result.records + 1, "cut {cut}");
        assert!(audit.verify(None).unwrap().ok, "cut {cut}");
    }
}

#[test]
fn every_changed_byte_removed_line_and_swapped_line_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("audit");
    let audit = log_of(&path, 4);
    let good = std::fs::read(&path).unwrap();
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 1;
        std::fs::write(&path, &bad).unwrap();
        assert!(!audit.verify(None).unwrap().ok, "byte {at}");
    }
    let lines: Vec<&[u8]> = good.split_inclusive(|byte| *byte == b'\n').collect();
    for order in [vec![1, 2, 3], vec![0, 2, 3], vec![0, 1, 3], vec![1, 0, 2, 3], vec![0, 1, 1, 2, 3], vec![0, 2, 1, 3]]
    {
        std::fs::write(&path, order.iter().map(|at| lines[*at]).collect::<Vec<_>>().concat()).unwrap();
        assert!(!audit.verify(None).unwrap().ok, "{order:?}");
    }
    // An end that was cut off at a line is found by who has noted the last hash.
    let noted = String::from_utf8(lines[3][..64].to_vec()).unwrap();
    std::fs::write(&path, lines[..3].concat()).unwrap();
    assert!(audit.verify(None).unwrap().ok);
    assert!(!audit.verify(Some(&noted)).unwrap().ok);
}

#[test]
fn a_damaged_end_does_not_stop_the_log_and_stays_found() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("audit");
    log_of(&path, 2);
    let mut bad = std::fs::read(&path).unwrap();
    let at = bad.len() - 10;
    bad[at] ^= 1;
    std::fs::write(&path, &bad).unwrap();
    let audit = Audit::open(path.clone());
    audit.append(ask(3)).unwrap();
    let result = audit.verify(None).unwrap();
    assert!(!result.ok);
    assert_eq!(result.damaged.iter().map(|damage| damage.line).collect::<Vec<_>>(), [2]);
    std::fs::write(&path, "x".repeat(100 << 10)).unwrap();
    assert!(Audit::open(path).append(ask(1)).is_err());
}

#[test]
fn what_is_quoted_is_short_and_on_one_line() {
    assert_eq!(quoted("a\nb"), "a b");
    assert!(quoted(&"é".repeat(5000)).len() <= TEXT_MAX);
}
