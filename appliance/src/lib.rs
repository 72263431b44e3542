//! Lifeboat boots a virtual machine straight from its backup. This crate is the program: its operations ([`api`]),
//! the command line that asks for them ([`cli`]), and what joins the libraries that carry them ([`exports`]).

pub mod access;
pub mod admission;
pub mod api;
pub mod app;
mod blocks;
pub mod capture;
pub mod catalog;
mod causes;
pub mod cli;
pub mod collect;
mod crash;
pub mod disks;
pub mod drill;
pub mod exports;
pub mod files;
mod forget;
mod frozen;
pub mod hardware;
pub mod inspect;
pub mod jobs;
pub mod journal;
mod keyless;
mod keys;
pub mod log;
pub mod problem;
pub mod publish;
mod qemu_nbd;
pub mod recovery;
pub mod rehydrate;
pub mod restore;
mod retention;
pub mod service;
pub mod signals;
pub mod state_dir;
pub mod statistics;
pub mod verify;
