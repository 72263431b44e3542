//! The service's configuration file. docs/guide/lifeboat.toml is the sample that explains every key; a test holds it to
//! this module. A mistake is told with file, line and key, and a key that does not exist is a mistake.

mod place;
mod values;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use nbd_server::tls::{ClientCertificates, TlsServer};
use serde::Deserialize;

use crate::api::network::{NetworkOptions, Security};
use crate::app::{Options, read_passphrase, read_small};
use crate::problem::{Kind, Problem};
use crate::schedule::policy::{AlertsConfig, HooksConfig, Policy, PolicyConfig};
use place::Places;
use values::{AbsolutePath, Location, LogFilter, Size};

/// A configuration of more bytes is not one.
const LEN_MAX: u64 = 1 << 20;

/// What the file says.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    repository: Option<Location>,
    state: Option<AbsolutePath>,
    passphrase_file: Option<AbsolutePath>,
    key_file: Option<AbsolutePath>,
    cache: Option<Size>,
    listen: Option<Listen>,
    /// How it logs.
    pub log: Log,
    policies: BTreeMap<String, PolicyConfig>,
    alerts: AlertsConfig,
    /// Which programs are told of what happens.
    pub hooks: HooksConfig,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Listen {
    address: SocketAddr,
    #[serde(default)]
    tls_dir: Option<AbsolutePath>,
    #[serde(default)]
    client_certificates: bool,
    #[serde(default)]
    insecure_http: bool,
}

/// How the service logs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Log {
    filter: Option<LogFilter>,
    /// As text or JSON.
    pub format: LogFormat,
}

impl Log {
    /// What is logged, in tracing's syntax.
    pub fn filter(&self) -> Option<&str> {
        self.filter.as_ref().map(|filter| filter.0.as_str())
    }
}

/// The form of the log.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LogFormat {
    /// Lines for people.
    #[default]
    Text,
    /// An object a line.
    Json,
}

/// A file that has been read.
#[derive(Debug, Clone)]
pub struct ConfigFile {
    path: PathBuf,
    text: String,
    /// What it says.
    pub config: Config,
}

impl ConfigFile {
    /// Reads a file. Whether what it names is there is another question: [`ConfigFile::check`].
    pub fn read(path: &Path) -> Result<ConfigFile, Problem> {
        let read = || {
            use std::io::Read;
            let mut text = String::new();
            if std::fs::File::open(path)?.take(LEN_MAX + 1).read_to_string(&mut text)? as u64 > LEN_MAX {
                return Err(std::io::Error::new(std::io::ErrorKind::FileTooLarge, "it is longer than 1 MiB"));
            }
            Ok(text)
        };
        let text = read().map_err(|error| {
            let kind = if error.kind() == std::io::ErrorKind::NotFound { Kind::NotFound } else { Kind::Failed };
            Problem::because(kind, format!("cannot read the configuration {}", path.display()), &error)
        })?;
        ConfigFile::parse(path, text)
    }

    fn parse(path: &Path, text: String) -> Result<ConfigFile, Problem> {
        let config = toml::from_str::<Config>(&text).map_err(|error| {
            let places = Places::of(&text);
            let place = error.span().map_or(String::new(), |span| places.tell(&text, span.start));
            Problem::usage(format!("{}{place}: {}", path.display(), error.message().replace('\n', " ")))
        })?;
        let file = ConfigFile { path: path.to_owned(), text, config };
        file.check_together()?;
        file.policies()?;
        Ok(file)
    }

    /// A mistake in what `key` says.
    pub fn mistake(&self, key: &str, what: &str) -> Problem {
        let line = Places::of(&self.text).line_of(key).map_or(String::new(), |line| format!(" line {line},"));
        Problem::usage(format!("{}:{line} key {key}: {what}", self.path.display()))
    }

    /// Keys that do not go together.
    fn check_together(&self) -> Result<(), Problem> {
        if self.config.passphrase_file.is_some() && self.config.key_file.is_some() {
            return Err(self.mistake("key-file", "there is a passphrase-file too; one of them opens the repository"));
        }
        let Some(listen) = &self.config.listen else { return Ok(()) };
        if listen.insecure_http && (listen.tls_dir.is_some() || listen.client_certificates) {
            return Err(self.mistake("listen.insecure-http", "there are certificates too; take one of them away"));
        }
        if listen.insecure_http && !listen.address.ip().is_loopback() {
            return Err(self.mistake("listen.insecure-http", "without TLS the API is served on loopback only"));
        }
        if listen.client_certificates && listen.tls_dir.is_none() {
            let what = "tls-dir has to name the folder with the ca-cert.pem that clients' certificates come from";
            return Err(self.mistake("listen.client-certificates", what));
        }
        Ok(())
    }

    /// What is opened, where the command line says nothing else.
    pub fn complete(&self, mut options: Options, state_given: bool) -> Options {
        let config = &self.config;
        let owned = |path: &AbsolutePath| path.0.clone();
        if options.repository.as_ref().is_none_or(String::is_empty) {
            options.repository = config.repository.as_ref().map(|location| location.0.clone());
        }
        if let (false, Some(state)) = (state_given, &config.state) {
            options.state = state.0.clone();
        }
        let secret_given = options.passphrase.as_ref().is_some_and(|passphrase| !passphrase.is_empty());
        if options.passphrase_file.is_none() && options.key_file.is_none() && !secret_given {
            options.passphrase_file = config.passphrase_file.as_ref().map(owned);
            options.key_file = config.key_file.as_ref().map(owned);
        }
        options
    }

    /// What the service does by itself.
    pub fn policies(&self) -> Result<BTreeMap<String, Policy>, Problem> {
        let mut policies = BTreeMap::new();
        for (name, config) in &self.config.policies {
            let policy = config.policy(name).map_err(|(key, what)| {
                let key = if key.is_empty() { format!("policies.{name}") } else { format!("policies.{name}.{key}") };
                self.mistake(&key, &what)
            })?;
            policies.insert(name.clone(), policy);
        }
        Ok(policies)
    }

    /// Who is told what somebody has to know.
    pub fn alerts(&self) -> &AlertsConfig {
        &self.config.alerts
    }

    /// The cache, if the file says how much.
    pub fn cache(&self) -> Option<u64> {
        self.config.cache.map(|Size(bytes)| bytes)
    }

    /// Where the service listens on the network.
    pub fn network(&self) -> Option<NetworkOptions> {
        let listen = self.config.listen.as_ref()?;
        let clients =
            if listen.client_certificates { ClientCertificates::Required } else { ClientCertificates::Waived };
        let folder = listen.tls_dir.as_ref().map(|folder| folder.0.clone());
        let security = if listen.insecure_http { Security::Plain } else { Security::Tls { folder, clients } };
        Some(NetworkOptions { listen: listen.address, security })
    }

    /// Whether what the file names is there and can be used. Nothing is opened for good, made or changed.
    pub fn check(&self) -> Result<(), Problem> {
        let unusable = |key: &str, problem: Problem| self.mistake(key, &problem.to_string());
        if let Some(Location(location)) = &self.config.repository {
            let folder = crate::app::repository_path(location).map_err(|problem| unusable("repository", problem))?;
            if !folder.join("repository").is_file() {
                let what = format!("there is no repository in {}; `lifeboat init` makes one", folder.display());
                return Err(self.mistake("repository", &what));
            }
        }
        if let Some(AbsolutePath(path)) = &self.config.passphrase_file {
            read_passphrase(path).map_err(|problem| unusable("passphrase-file", problem))?;
        }
        if let Some(AbsolutePath(path)) = &self.config.key_file {
            read_small(path, "key file").map_err(|problem| unusable("key-file", problem))?;
        }
        if let Some(NetworkOptions { security: Security::Tls { folder: Some(folder), clients }, .. }) = self.network() {
            let server = match clients {
                ClientCertificates::Required => TlsServer::from_folder(&folder, clients),
                ClientCertificates::Waived => TlsServer::one_sided(&folder),
            };
            server.map_err(|error| unusable("listen.tls-dir", Problem::from_tls(&folder, &error)))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAMPLE: &str = include_str!("../../../docs/guide/lifeboat.toml");

    fn parse(text: &str) -> Result<ConfigFile, String> {
        ConfigFile::parse(Path::new("l.toml"), text.to_owned()).map_err(|problem| problem.title)
    }

    #[test]
    fn the_sample_is_good_and_names_every_key() {
        parse(SAMPLE).unwrap();
        // With the comment signs of its keys taken away, every key is there.
        let all: String = SAMPLE
            .lines()
            .map(|line| match line.strip_prefix('#') {
                Some(key) if !key.starts_with(' ') => key,
                _ => line,
            })
            .filter(|line| !line.starts_with("key-file") && !line.starts_with("insecure-http"))
            .map(|line| format!("{line}\n"))
            .collect();
        parse(&all).unwrap_or_else(|problem| panic!("{problem}\n{all}"));
        // A machine's own drill has the keys of the policy's.
        let (before, own) = all.split_once("[policies.daily.machines.web01.drill]").expect("it is in the sample");
        let (_, after) = own.split_once("\n\n").expect("there is more");
        let config = parse(&format!("{before}\n{after}")).expect("it is good without").config;
        let Config { repository, state, passphrase_file, key_file: _, cache, listen, log, policies, alerts, hooks } =
            config;
        assert!(repository.is_some() && state.is_some() && passphrase_file.is_some() && cache.is_some());
        let Listen { address: _, tls_dir, client_certificates, insecure_http: _ } = listen.unwrap();
        assert!(tls_dir.is_some() && client_certificates);
        assert!(log.filter.is_some());
        let AlertsConfig { command, webhook, stale_after, low_space } = alerts;
        assert!(command.is_some() && webhook.is_some() && stale_after.is_some() && low_space.is_some());
        let HooksConfig { drill, recovery, deadline } = hooks;
        assert!(drill.is_some() && recovery.is_some() && deadline.is_some());
        // Each key of a policy is told in the form that is printed of it.
        let policies = format!("{policies:?}").replace("point: None, ", "").replace(", drill: None }", " }");
        assert!(!policies.contains("None"), "a key of a policy is not in the sample: {policies}");
        for left_out in ["#key-file = ", "#insecure-http = "] {
            assert!(SAMPLE.contains(left_out), "{left_out}");
        }
    }

    #[test]
    fn a_mistake_is_told_with_its_line_and_key() {
        for (text, line, key, what) in [
            ("repository = \"/r\"\nrepo = 1\n", 2, "repo", "unknown field"),
            ("\n[listen]\naddress = \"nowhere\"\n", 3, "listen.address", "socket address"),
            ("[listen]\naddress = \"127.0.0.1:1\"\nport = 3\n", 3, "listen.port", "unknown field"),
            ("cache = \"12 elephants\"\n", 1, "cache", "not a size"),
            ("cache = 12\n", 1, "cache", "string"),
            ("# one\nstate = \"here\"\n", 2, "state", "absolute"),
            ("repository = \"s3://bucket\"\n", 1, "repository", "local folder"),
            ("[log]\nformat = \"xml\"\n", 2, "log.format", "xml"),
            ("[log]\nfilter = \"=[\"\n", 2, "log.filter", "filter"),
            ("passphrase-file = \"/p\"\nkey-file = \"/k\"\n", 2, "key-file", "passphrase-file"),
            ("[listen]\naddress = \"0.0.0.0:1\"\ninsecure-http = true\n", 3, "listen.insecure-http", "loopback"),
            (
                "[listen]\naddress = \"0.0.0.0:1\"\nclient-certificates = true\n",
                3,
                "listen.client-certificates",
                "tls-dir",
            ),
        ] {
            let said = parse(text).unwrap_err();
            let place = format!("l.toml: line {line}, key {key}: ");
            assert!(said.starts_with(&place) && said.contains(what), "{text:?}: {said}");
        }
        for (policy, line, key, what) in [
            ("schedule = \"0 3 * *\"", 2, "schedule", "not a schedule"),
            ("schedule = \"0 3 31 2 *\"\ncollect = true", 2, "schedule", "never due"),
            ("schedule = \"0 3 * * *\"", 1, "", "does nothing"),
            ("schedule = \"0 3 * * *\"\ntime-zone = \"Europe/Bern\"", 3, "time-zone", "time zone"),
            ("schedule = \"0 3 * * *\"\nwindow = \"22\"", 3, "window", "22:00-06:00"),
            ("schedule = \"0 3 * * *\"\nretries = 99", 3, "retries", "too many"),
            ("schedule = \"0 3 * * *\"\nverify = \"most\"", 3, "verify", "most"),
            ("schedule = \"0 3 * * *\"\nbefore = [\"sh\"]", 3, "before", "absolute path"),
            ("schedule = \"0 3 * * *\"\n[policies.daily.machines.a]\nsources = []", 4, "machines.a.sources", "no disk"),
            ("schedule = \"0 3 * * *\"\n[policies.daily.libvirt]\ndomains = []", 4, "libvirt.domains", "no domain"),
            (
                "schedule = \"0 3 * * *\"\n[policies.daily.libvirt]\ndomains = [\"web-[\"]",
                4,
                "libvirt.domains",
                "pattern",
            ),
            ("schedule = \"0 3 * * *\"\n[policies.daily.drill]\nexpect = [\"(\"]", 3, "drill", "cannot be expected"),
            ("schedule = \"0 3 * * *\"\n[policies.daily.drill]\nprots = [22]", 4, "drill.prots", "unknown field"),
            (
                "schedule = \"0 3 * * *\"\n[policies.daily.retention]\nkeep-dayly = 1",
                4,
                "retention.keep-dayly",
                "unknown",
            ),
            (
                "schedule = \"0 3 * * *\"\ncollect = true\n[policies.daily.retention]\nkeep-daily = 1",
                4,
                "retention",
                "no machines",
            ),
        ] {
            let said = parse(&format!("[policies.daily]\n{policy}\n")).unwrap_err();
            let key = if key.is_empty() { "policies.daily".to_owned() } else { format!("policies.daily.{key}") };
            let place = format!("l.toml: line {line}, key {key}: ");
            assert!(said.starts_with(&place) && said.contains(what), "{policy:?}: {said}");
        }
        let secret = "https-//chat.example/hooks/secret";
        let said = parse(&format!("[alerts]\nwebhook = \"{secret}\"\n")).unwrap_err();
        assert!(said.contains("alerts.webhook") && !said.contains("secret"), "{said}");
        let said = parse("repository = \"/r\n").unwrap_err();
        assert!(said.starts_with("l.toml: line 1"), "{said}");
        let said = parse("state = \"/a\"\nstate = \"/b\"\n").unwrap_err();
        assert!(said.contains("line 2") && said.contains("duplicate"), "{said}");
    }

    #[test]
    fn the_command_line_comes_before_the_file() {
        let file = parse("repository = \"/r\"\nstate = \"/s\"\npassphrase-file = \"/p\"\n").unwrap();
        let bare = Options {
            repository: None,
            state: "/default".into(),
            passphrase_file: None,
            passphrase: None,
            key_file: None,
            cache: 1,
        };
        let of_file = file.complete(bare.clone(), false);
        assert_eq!((of_file.repository.as_deref(), of_file.state.to_str()), (Some("/r"), Some("/s")));
        assert_eq!(of_file.passphrase_file, Some("/p".into()));
        let given = Options { repository: Some("/other".into()), key_file: Some("/k".into()), ..bare };
        let both = file.complete(given, true);
        assert_eq!((both.repository.as_deref(), both.state.to_str()), (Some("/other"), Some("/default")));
        assert_eq!((both.passphrase_file, both.key_file), (None, Some("/k".into())));
    }
}
