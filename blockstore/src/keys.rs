//! Secrets, the master key, and the keys derived from it. Specification: docs/format/keys.md

use std::fmt;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::thread;

use aes_gcm::aead::inout::InOutBuf;
use aes_gcm::{AeadInOut, Aes256Gcm, KeyInit};
use quick_cache::sync::Cache;
use zeroize::{Zeroize, Zeroizing};

use crate::format::FormatError;
use crate::format::config::Config;
use crate::format::slot::{Slot, Stretch};
use crate::id::{ChunkId, SlotId};

const CHUNK_CONTEXT: &str = "lifeboat 1 chunk id";
const NODE_CONTEXT: &str = "lifeboat 1 node id";
const PACK_CONTEXT: &str = "lifeboat 1 pack";
const POINT_CONTEXT: &str = "lifeboat 1 point";
const DRILL_CONTEXT: &str = "lifeboat 1 drill";
const PLAIN_NODE_CONTEXT: &str = "lifeboat 1 plain node id";
const KEY_FILE_CONTEXT: &str = "lifeboat 1 key file";
const WRAP_CONTEXT: &str = "lifeboat 1 key slot wrap";
const CHECK_CONTEXT: &str = "lifeboat 1 key slot check";

/// Ciphers of packs that are kept, each about 1 KiB: 32 GiB of packs that are read all over.
const OPENING: usize = 512;

/// Shortest key file.
pub const MIN_KEY_FILE_LEN: usize = 32;
/// Longest key file.
pub const MAX_KEY_FILE_LEN: usize = 64 << 10;

/// What opens an encrypted repository. Wiped from memory when dropped.
pub struct Secret(SecretKind);

enum SecretKind {
    Passphrase(Zeroizing<String>),
    KeyFile(Zeroizing<Vec<u8>>),
}

impl Secret {
    /// A passphrase, exactly as given: a trailing line end belongs to it.
    pub fn passphrase(passphrase: String) -> Secret {
        Secret(SecretKind::Passphrase(Zeroizing::new(passphrase)))
    }

    /// The bytes of a key file.
    pub fn key_file(bytes: Vec<u8>) -> Secret {
        Secret(SecretKind::KeyFile(Zeroizing::new(bytes)))
    }

    /// Whether the secret is long enough to protect anything.
    pub(crate) fn is_usable(&self) -> bool {
        match &self.0 {
            SecretKind::Passphrase(text) => !text.is_empty(),
            SecretKind::KeyFile(bytes) => (MIN_KEY_FILE_LEN..=MAX_KEY_FILE_LEN).contains(&bytes.len()),
        }
    }

    /// The 32 bytes a slot's keys come from, or none if the slot is for the other kind of secret.
    fn stretch(&self, stretch: &Stretch, salt: &[u8; 32]) -> Option<Zeroizing<[u8; 32]>> {
        match (&self.0, stretch) {
            (SecretKind::Passphrase(text), Stretch::Passphrase { memory_kib, passes, lanes }) => {
                let params = argon2::Params::new(*memory_kib, *passes, *lanes, Some(32)).ok()?;
                let argon = argon2::Argon2::new(argon2::Algorithm::Argon2id, argon2::Version::V0x13, params);
                let mut out = Zeroizing::new([0; 32]);
                let threads = lane_threads(*lanes)?;
                threads.install(|| argon.hash_password_into(text.as_bytes(), salt, out.as_mut_slice())).ok()?;
                Some(out)
            }
            (SecretKind::KeyFile(bytes), Stretch::KeyFile) => {
                let mut hasher = blake3::Hasher::new_derive_key(KEY_FILE_CONTEXT);
                hasher.update(bytes).update(salt);
                Some(Zeroizing::new(*hasher.finalize().as_bytes()))
            }
            _ => None,
        }
    }

    /// How writers stretch this kind of secret.
    fn default_stretch(&self) -> Stretch {
        match self.0 {
            // The second choice of RFC 9106: the first wants 2 GiB of memory.
            SecretKind::Passphrase(_) => Stretch::Passphrase { memory_kib: 64 << 10, passes: 3, lanes: 4 },
            SecretKind::KeyFile(_) => Stretch::KeyFile,
        }
    }
}

/// Threads for the lanes of one Argon2 call, gone with it. Without them the library would start its own for every core
/// of the machine, for ever.
fn lane_threads(lanes: u32) -> Option<rayon::ThreadPool> {
    let cores = thread::available_parallelism().map_or(1, NonZeroUsize::get);
    let count = usize::try_from(lanes).map_or(cores, |lanes| lanes.clamp(1, cores));
    let threads = rayon::ThreadPoolBuilder::new().num_threads(count).thread_name(|_| "argon2".to_owned()).build();
    threads.inspect_err(|error| tracing::error!(%error, "no threads for Argon2: a passphrase cannot be tried")).ok()
}

impl fmt::Debug for Secret {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("Secret")
    }
}

/// How a new repository is protected.
#[derive(Debug)]
pub enum Protection {
    /// Chunks and recovery points are stored readable by anybody.
    None,
    /// Everything is encrypted; this secret is the first that opens it.
    Secret(Secret),
}

/// The root of all keys.
pub(crate) struct MasterKey(Zeroizing<[u8; 32]>);

/// What came of trying a secret on a slot.
pub(crate) enum Unwrapped {
    Open(MasterKey),
    /// The secret is not this slot's.
    Wrong,
    /// The secret is right, but the slot or the configuration was changed.
    Changed,
}

impl MasterKey {
    pub fn new(bytes: [u8; 32]) -> MasterKey {
        MasterKey(Zeroizing::new(bytes))
    }

    /// Whether both are the same key.
    pub fn is(&self, other: &MasterKey) -> bool {
        blake3::Hash::from_bytes(*self.0) == blake3::Hash::from_bytes(*other.0) // in constant time
    }

    /// A slot in which `secret` wraps this key. `random` is fresh randomness: salt, nonce.
    pub fn wrap(
        &self,
        config: &Config,
        secret: &Secret,
        id: SlotId,
        random: &[u8; 44],
        created_unix_s: u64,
        label: &str,
    ) -> Option<Slot> {
        let stretch = secret.default_stretch();
        let (salt, nonce) = random.split_at(32);
        let mut slot = Slot {
            id,
            repository: config.repository,
            created_unix_s,
            stretch,
            salt: salt.try_into().ok()?,
            check: [0; 16],
            nonce: nonce.try_into().ok()?,
            sealed: [0; 48],
            label: label.to_owned(),
        };
        let stretched = secret.stretch(&slot.stretch, &slot.salt)?;
        slot.check = check_value(&stretched);
        let mut sealed = slot.sealed;
        let (key, tag) = sealed.split_at_mut(32);
        key.copy_from_slice(self.0.as_slice());
        let made = wrap_cipher(&stretched).seal(&slot.nonce, &wrap_data(config, &slot), key)?;
        tag.copy_from_slice(&made);
        slot.sealed = sealed;
        Some(slot)
    }

    /// Tries `secret` on a slot.
    pub fn unwrap(config: &Config, slot: &Slot, secret: &Secret) -> Unwrapped {
        let Some(stretched) = secret.stretch(&slot.stretch, &slot.salt) else { return Unwrapped::Wrong };
        if blake3::Hash::from_bytes(double(check_value(&stretched))) != blake3::Hash::from_bytes(double(slot.check)) {
            return Unwrapped::Wrong; // compared in constant time
        }
        let mut sealed = Zeroizing::new(slot.sealed);
        match wrap_cipher(&stretched).open(&slot.nonce, &wrap_data(config, slot), sealed.as_mut_slice()) {
            Some(key) => match <[u8; 32]>::try_from(&*key) {
                Ok(bytes) => Unwrapped::Open(MasterKey::new(bytes)),
                Err(_) => Unwrapped::Changed,
            },
            None => Unwrapped::Changed,
        }
    }
}

fn double(half: [u8; 16]) -> [u8; 32] {
    let mut whole = [0; 32];
    whole.iter_mut().zip(half.iter().chain(&half)).for_each(|(to, from)| *to = *from);
    whole
}

fn check_value(stretched: &[u8; 32]) -> [u8; 16] {
    let derived = blake3::derive_key(CHECK_CONTEXT, stretched);
    derived.first_chunk().copied().unwrap_or_default()
}

fn wrap_cipher(stretched: &[u8; 32]) -> Cipher {
    Cipher::new(&blake3::derive_key(WRAP_CONTEXT, stretched))
}

fn wrap_data(config: &Config, slot: &Slot) -> Vec<u8> {
    let mut data = config.encode().to_vec();
    data.extend(slot.associated_data());
    data
}

/// The keys in use: names chunks and makes ciphers. Without encryption it hashes without a key and makes none.
pub(crate) struct Keyring {
    keys: Option<DerivedKeys>,
}

struct DerivedKeys {
    /// Wrapped anew for another key slot.
    master: MasterKey,
    chunk: [u8; 32],
    node: [u8; 32],
    pack: [u8; 32],
    point: [u8; 32],
    drill: [u8; 32],
    /// Ciphers of packs that were read, by salt: expanding a key takes longer than opening a short frame.
    opening: Cache<[u8; 32], Arc<Cipher>>,
}

impl Drop for DerivedKeys {
    fn drop(&mut self) {
        self.chunk.zeroize();
        self.node.zeroize();
        self.pack.zeroize();
        self.point.zeroize();
        self.drill.zeroize();
    }
}

impl fmt::Debug for Keyring {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(if self.keys.is_some() { "Keyring(sealed)" } else { "Keyring(plain)" })
    }
}

impl Keyring {
    /// The keyring of a repository without encryption.
    pub fn plain() -> Keyring {
        Keyring { keys: None }
    }

    /// All keys of an encrypted repository.
    pub fn derive(master: &MasterKey) -> Keyring {
        let derive = |context| blake3::derive_key(context, master.0.as_slice());
        Keyring {
            keys: Some(DerivedKeys {
                master: MasterKey(master.0.clone()),
                chunk: derive(CHUNK_CONTEXT),
                node: derive(NODE_CONTEXT),
                pack: derive(PACK_CONTEXT),
                point: derive(POINT_CONTEXT),
                drill: derive(DRILL_CONTEXT),
                opening: Cache::new(OPENING),
            }),
        }
    }

    /// The master key of an encrypted repository.
    pub fn master(&self) -> Option<&MasterKey> {
        self.keys.as_ref().map(|keys| &keys.master)
    }

    /// The id of a chunk that is not all zeroes.
    pub fn chunk_id(&self, chunk: &[u8]) -> ChunkId {
        let hash = match &self.keys {
            Some(keys) => blake3::keyed_hash(&keys.chunk, chunk),
            None => blake3::hash(chunk),
        };
        ChunkId(*hash.as_bytes())
    }

    /// The id of a manifest node that is not all zeroes.
    pub fn node_id(&self, level: u8, node: &[u8]) -> ChunkId {
        let mut hasher = match &self.keys {
            Some(keys) => blake3::Hasher::new_keyed(&keys.node),
            None => blake3::Hasher::new_derive_key(PLAIN_NODE_CONTEXT),
        };
        hasher.update(&[level]).update(node);
        ChunkId(*hasher.finalize().as_bytes())
    }

    /// The cipher of a pack that is read, if frames are sealed; kept for the next read.
    pub fn opening_cipher(&self, salt: &[u8; 32]) -> Option<Arc<Cipher>> {
        let keys = self.keys.as_ref()?;
        if let Some(cipher) = keys.opening.get(salt) {
            return Some(cipher);
        }
        let cipher = Arc::new(self.pack_cipher(salt)?);
        keys.opening.insert(*salt, Arc::clone(&cipher));
        Some(cipher)
    }

    /// The cipher of a pack's frames, if frames are sealed.
    pub fn pack_cipher(&self, salt: &[u8; 32]) -> Option<Cipher> {
        self.keys.as_ref().map(|keys| Cipher::new(blake3::keyed_hash(&keys.pack, salt).as_bytes()))
    }

    /// The cipher of a recovery point, if points are sealed.
    pub fn point_cipher(&self, salt: &[u8; 32]) -> Option<Cipher> {
        self.keys.as_ref().map(|keys| Cipher::new(blake3::keyed_hash(&keys.point, salt).as_bytes()))
    }

    /// The cipher of a drill's result, if points are sealed.
    pub fn drill_cipher(&self, salt: &[u8; 32]) -> Option<Cipher> {
        self.keys.as_ref().map(|keys| Cipher::new(blake3::keyed_hash(&keys.drill, salt).as_bytes()))
    }
}

/// AES-256-GCM with one key.
pub(crate) struct Cipher(Box<Aes256Gcm>);

impl Cipher {
    fn new(key: &[u8; 32]) -> Cipher {
        Cipher(Box::new(Aes256Gcm::new(key.into())))
    }

    /// Seals in place and returns the tag. None if the message is too long for GCM.
    pub fn seal(&self, nonce: &[u8; 12], data: &[u8], message: &mut [u8]) -> Option<[u8; 16]> {
        let tag = self.0.encrypt_inout_detached(nonce.into(), data, InOutBuf::from(message)).ok()?;
        Some(tag.into())
    }

    /// Opens message and tag in place and returns the message, or none if they do not fit.
    pub fn open<'a>(&self, nonce: &[u8; 12], data: &[u8], sealed: &'a mut [u8]) -> Option<&'a mut [u8]> {
        let (message, tag) = sealed.split_last_chunk_mut::<16>()?;
        let tag = *tag;
        self.0.decrypt_inout_detached(nonce.into(), data, InOutBuf::from(&mut *message), (&tag).into()).ok()?;
        Some(message)
    }
}

/// The nonce of a frame: its number in the pack.
pub(crate) fn frame_nonce(frame: u32) -> [u8; 12] {
    let mut nonce = [0; 12];
    nonce.iter_mut().zip(frame.to_le_bytes()).for_each(|(to, from)| *to = from);
    nonce
}

/// Fresh randomness from the operating system.
pub(crate) fn random<const N: usize>() -> std::io::Result<[u8; N]> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(std::io::Error::other)?;
    Ok(bytes)
}

/// Checks that a slot stands under its own name and belongs to the repository.
pub(crate) fn check_slot(slot: &Slot, name: SlotId, config: &Config) -> Result<(), FormatError> {
    if slot.repository != config.repository {
        return Err(FormatError::OtherRepository);
    }
    if slot.id != name { Err(FormatError::Name) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::Encryption;
    use crate::id::RepositoryId;

    fn config() -> Config {
        Config { repository: RepositoryId([1; 16]), chunk_size: 65536, encryption: Encryption::Aes256Gcm }
    }

    fn key_file(byte: u8) -> Secret {
        Secret::key_file(vec![byte; 64])
    }

    fn wrapped() -> Slot {
        let master = MasterKey::new([7; 32]);
        master.wrap(&config(), &key_file(1), SlotId([2; 16]), &[3; 44], 1, "").expect("fits")
    }

    #[test]
    fn a_secret_opens_its_own_slot_only() {
        let slot = wrapped();
        let Unwrapped::Open(master) = MasterKey::unwrap(&config(), &slot, &key_file(1)) else { panic!("must open") };
        assert_eq!(*master.0, [7; 32]);
        assert!(matches!(MasterKey::unwrap(&config(), &slot, &key_file(2)), Unwrapped::Wrong));
        let passphrase = Secret::passphrase("x".into());
        assert!(matches!(MasterKey::unwrap(&config(), &slot, &passphrase), Unwrapped::Wrong));
    }

    #[test]
    fn a_passphrase_is_stretched_as_the_reference_does_with_one_lane_and_with_several() {
        // echo -n 'correct horse' | argon2 saltsaltsaltsaltsaltsaltsaltsalt -id -t 2 -k 256 -l 32 -r -p LANES
        let expected = [
            (1, "42c4216fef0c906f5a599e8cdbfe67ee27c1313cd8350de10241b21794ee49bb"),
            (4, "41e0616df31b23762415257d2e6797859b54b515e47ff9da81a2bb933202333e"),
        ];
        let secret = Secret::passphrase("correct horse".into());
        for (lanes, expected) in expected {
            let cost = Stretch::Passphrase { memory_kib: 256, passes: 2, lanes };
            let out = secret.stretch(&cost, b"saltsaltsaltsaltsaltsaltsaltsalt").expect("a passphrase");
            assert_eq!(blake3::Hash::from_bytes(*out).to_hex().as_str(), expected);
        }
    }

    #[test]
    fn a_changed_configuration_or_slot_does_not_open() {
        let changed = Config { chunk_size: 32768, ..config() };
        assert!(matches!(MasterKey::unwrap(&changed, &wrapped(), &key_file(1)), Unwrapped::Changed));
        let slot = Slot { created_unix_s: 2, ..wrapped() };
        assert!(matches!(MasterKey::unwrap(&config(), &slot, &key_file(1)), Unwrapped::Changed));
    }

    #[test]
    fn derived_keys_and_ids_never_change() {
        let keyring = Keyring::derive(&MasterKey::new([7; 32]));
        let plain = Keyring::plain();
        let node = vec![1; 16384];
        let ids = [
            keyring.chunk_id(b"chunk"),
            keyring.node_id(0, &node),
            keyring.node_id(1, &node),
            plain.chunk_id(b"chunk"),
            plain.node_id(0, &node),
        ];
        assert_eq!(ids[3].0, *blake3::hash(b"chunk").as_bytes());
        let text: Vec<String> = ids.iter().map(|id| id.to_string()[..16].to_owned()).collect();
        assert_eq!(text, GOLDEN_IDS);
        let mut sealed = *b"message and room for the tag....";
        let cipher = keyring.pack_cipher(&[9; 32]).expect("sealed");
        let tag = cipher.seal(&frame_nonce(5), b"data", &mut sealed[..16]).expect("short");
        sealed[16..].copy_from_slice(&tag);
        assert_eq!(sealed[..8], GOLDEN_SEAL);
        assert_eq!(cipher.open(&frame_nonce(5), b"data", &mut sealed.clone()).expect("intact"), b"message and room");
        assert!(cipher.open(&frame_nonce(6), b"data", &mut sealed.clone()).is_none());
        assert!(cipher.open(&frame_nonce(5), b"dat", &mut sealed.clone()).is_none());
        assert!(cipher.open(&frame_nonce(5), b"data", &mut { sealed }[..15]).is_none());
    }

    const GOLDEN_IDS: [&str; 5] =
        ["9c19a030bf4d1870", "1c5ae064dd08812b", "5910a5aca69b12d1", "6b1d440ada61d0f4", "52801e0b97488b8a"];
    const GOLDEN_SEAL: [u8; 8] = [152, 108, 251, 37, 143, 189, 185, 13];
}
