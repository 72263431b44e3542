//! Where in a TOML text something is said: line numbers and whole keys.

/// The key that each line sets, with the names of its table before it.
#[derive(Debug)]
pub struct Places {
    keys: Vec<Option<String>>,
}

impl Places {
    /// Looks at a text.
    pub fn of(text: &str) -> Places {
        let mut table = String::new();
        let mut keys = Vec::new();
        for line in text.lines() {
            let line = line.trim();
            if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.split(']').next()) {
                table = name.trim_matches('[').trim().to_owned();
                keys.push(Some(table.clone()));
                continue;
            }
            let key = line
                .split_once('=')
                .map(|(key, _)| key.trim().trim_matches('"'))
                .filter(|key| !key.is_empty() && key.chars().all(|c| c.is_alphanumeric() || "-_.\" ".contains(c)));
            keys.push(key.map(|key| if table.is_empty() { key.to_owned() } else { format!("{table}.{key}") }));
        }
        Places { keys }
    }

    /// The line that says `key`, from 1.
    pub fn line_of(&self, key: &str) -> Option<usize> {
        self.keys.iter().position(|found| found.as_deref() == Some(key)).map(|at| at + 1)
    }

    /// Line and key of a position in `text`, as they are put behind the name of a file.
    pub fn tell(&self, text: &str, position: usize) -> String {
        let before = text.as_bytes().get(..position).unwrap_or(text.as_bytes());
        let line = before.iter().filter(|byte| **byte == b'\n').count();
        match self.keys.get(line).cloned().flatten() {
            Some(key) => format!(": line {}, key {key}", line + 1),
            None => format!(": line {}", line + 1),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_found_with_their_tables() {
        let text = "a = 1\n\n# b = 2\n[t.u]\nc = 3\n [\"x y\"]\n d.e = \"=\"\n";
        let places = Places::of(text);
        for (key, line) in [("a", 1), ("t.u", 4), ("t.u.c", 5), ("\"x y\".d.e", 7)] {
            assert_eq!(places.line_of(key), Some(line), "{key}");
        }
        assert_eq!(places.line_of("b"), None);
        assert_eq!(places.tell(text, text.find("c = ").unwrap()), ": line 5, key t.u.c");
        assert_eq!(places.tell(text, 7), ": line 3");
    }
}
