//! The tables of addresses of both slots: slabs in one map of maps ([`ebpf::addresses`]).
//!
//! A large network has some hundreds of slabs, more than a process may hold descriptors; so each is
//! pinned, as `IDENTITIES-SLOT-NUMBER`, and opened when it is read or written. Those of the idle slot
//! are written over; nobody finds anything there until its [`Book`] says where.

use super::{ANY, AclError, MapKind, RawMap, failed};
use ebpf::abi::{Addr, SLOTS, maps};
use ebpf::addresses::{Book, LINE_BYTES, Owned, SLABS, Slab};
use engine::acl::addresses::{Laid, find};
use std::io;
use std::path::{Path, PathBuf};

/// New slabs that are put into the outer map at once.
const AT_ONCE: usize = 64;
/// Slabs beyond this many times what is needed are given back.
const MOST_TOO_MANY: u32 = 4;
/// What a slab's value is called.
const VALUE: u32 = 0;
/// Where values begin in arrays of kernels that do not tell what a map takes: 16 bytes into a line.
const USUAL_HEAD: usize = 16;
/// Kernels that do not tell round up to this.
const ROUNDED: usize = 4_096;

/// The slabs of both slots.
pub(super) struct Addresses {
    outer: RawMap,
    layout: PathBuf,
    /// Slabs of each slot that are in the outer map, from the first.
    there: [u32; SLOTS as usize],
    shift: u32,
}

impl Addresses {
    /// Those of a layout; `books` of the slots that are filled.
    pub(super) fn open(
        outer: RawMap,
        layout: &Path,
        books: [Option<Book>; SLOTS as usize],
    ) -> Result<Self, AclError> {
        Ok(Self {
            outer,
            layout: layout.to_owned(),
            there: books.map(|book| book.map_or(0, |book| book.slabs())),
            shift: shift()?,
        })
    }

    /// Where the first line of a slab begins, so that it is one of the processor's cache.
    pub(super) fn shift(&self) -> u32 {
        self.shift
    }

    /// Writes the slabs of a slot, which nobody reads.
    pub(super) fn write(&mut self, slot: u32, laid: &Laid) -> Result<(), AclError> {
        let mut made: Vec<RawMap> = Vec::new();
        for (number, slab) in (0..).zip(&laid.slabs) {
            if number < self.there[slot as usize] {
                if let Ok(map) = self.slab(slot, number) {
                    map.put(&VALUE, slab, ANY)?;
                    continue;
                }
                // Somebody took its pin away: this one and those after it are made anew.
                self.there[slot as usize] = number;
            }
            let map = create()?;
            map.put(&VALUE, slab, ANY)?;
            let path = self.path(slot, number);
            // One of a slot that was left half written.
            let _ = std::fs::remove_file(&path);
            map.pin(&path)?;
            made.push(map);
            if made.len() == AT_ONCE {
                self.put(slot, &made)?;
                made.clear();
            }
        }
        self.put(slot, &made)?;
        let needed = laid.book.slabs();
        if self.there[slot as usize] > needed * MOST_TOO_MANY {
            self.give_back(slot, needed)?;
        }
        Ok(())
    }

    /// Puts these slabs after those that are there.
    fn put(&mut self, slot: u32, made: &[RawMap]) -> Result<(), AclError> {
        let there = &mut self.there[slot as usize];
        let first = slot * SLABS + *there;
        let (numbers, fds): (Vec<u32>, Vec<u32>) =
            (first..).zip(made.iter().map(RawMap::number)).unzip();
        self.outer.put_all(&numbers, &fds)?;
        *there += u32::try_from(made.len()).unwrap_or(0);
        Ok(())
    }

    /// Leaves one empty slab in place of all from `needed` on: to take each out would be a grace
    /// period each.
    fn give_back(&mut self, slot: u32, needed: u32) -> Result<(), AclError> {
        let there = self.there[slot as usize];
        let empty = create()?;
        let numbers: Vec<u32> = (needed..there)
            .map(|number| slot * SLABS + number)
            .collect();
        self.outer
            .put_all(&numbers, &vec![empty.number(); numbers.len()])?;
        for number in needed..there {
            let _ = std::fs::remove_file(self.path(slot, number));
        }
        self.there[slot as usize] = needed;
        Ok(())
    }

    /// Adds a line to a slot that is read: by its pilot if that place is free, or as a newcomer. If
    /// neither is, it is the next swap that makes room.
    pub(super) fn add(&self, slot: u32, book: &Book, line: &Owned) -> Result<(), AclError> {
        let hash = book.hash(&line.addr);
        let at = Book::pilot(book.bucket(hash));
        let pilot = self.read(slot, at.slab)?.pilot(at.at).unwrap_or(0);
        // What nobody finds first, and then its address: a packet meets all of it or nothing.
        let nameless = Owned {
            addr: Owned::NONE.addr,
            ..*line
        };
        for place in [book.line(hash, pilot), book.newcomer(hash)] {
            let map = self.slab(slot, place.slab)?;
            let mut slab = self.read(slot, place.slab)?;
            if slab.line(place.at) == Some(Owned::NONE) {
                for line in [&nameless, line] {
                    slab.put_line(place.at, line);
                    map.put(&VALUE, &slab, ANY)?;
                }
                return Ok(());
            }
        }
        Err(error("add to", io::ErrorKind::StorageFull))
    }

    /// The line of an address.
    pub(super) fn find(&self, slot: u32, book: &Book, addr: &Addr) -> Option<Owned> {
        find(book, addr, |number| self.read(slot, number).ok())
    }

    /// At most so many lines of a slot.
    pub(super) fn lines(&self, slot: u32, book: &Book, limit: usize) -> Vec<Owned> {
        let slabs =
            (book.pilot_slabs..book.slabs()).filter_map(|number| self.read(slot, number).ok());
        let lines = slabs.flat_map(|slab| {
            (0..)
                .map_while(|number| slab.line(u64::from(book.shift) + number * LINE_BYTES as u64))
                .filter(|line| *line != Owned::NONE)
                .collect::<Vec<_>>()
        });
        lines.take(limit).collect()
    }

    fn read(&self, slot: u32, number: u32) -> Result<Slab, AclError> {
        let slab = self.slab(slot, number)?.get(&VALUE)?;
        slab.ok_or_else(|| error("read", io::ErrorKind::NotFound))
    }

    fn slab(&self, slot: u32, number: u32) -> Result<RawMap, AclError> {
        RawMap::from_pin(&self.path(slot, number))
            .map_err(|source| failed("open", maps::IDENTITIES, source))
    }

    fn path(&self, slot: u32, number: u32) -> PathBuf {
        self.layout
            .join(format!("{}-{slot}-{number}", maps::IDENTITIES))
    }
}

/// Makes and pins the outer map, if it is not there yet.
pub(super) fn make_outer(layout: &Path) -> Result<(), AclError> {
    let path = layout.join(maps::IDENTITIES);
    if path.exists() {
        return Ok(());
    }
    let index = size_of::<u32>();
    let slabs = (SLOTS * SLABS) as usize;
    let (kind, inner) = (MapKind::ArrayOfMaps, create()?);
    RawMap::create(kind, maps::IDENTITIES, index, index, slabs, Some(&inner))?.pin(&path)
}

fn create() -> Result<RawMap, AclError> {
    array(size_of::<Slab>())
}

/// An array of one value.
fn array(bytes: usize) -> Result<RawMap, AclError> {
    let key = size_of::<u32>();
    RawMap::create(MapKind::Slab, maps::IDENTITIES, key, bytes, 1, None)
}

fn error(what: &'static str, kind: io::ErrorKind) -> AclError {
    failed(what, maps::IDENTITIES, kind.into())
}

/// How far the value of an array is from the next line of the cache. The kernel tells what an array
/// takes (`memlock` in fdinfo), from 6.4 on to the byte: its head, and then the value. Who guesses
/// wrong reads two lines for one.
pub fn shift() -> Result<u32, AclError> {
    let probe = array(LINE_BYTES)?;
    let path = format!("/proc/self/fdinfo/{}", probe.number());
    let info = std::fs::read_to_string(path).unwrap_or_default();
    Ok(shift_of(&info))
}

fn shift_of(info: &str) -> u32 {
    let taken = info
        .lines()
        .find_map(|line| line.strip_prefix("memlock:")?.trim().parse::<usize>().ok());
    let head = match taken {
        Some(taken) if taken > LINE_BYTES && taken % ROUNDED != 0 => taken - LINE_BYTES,
        Some(_) | None => USUAL_HEAD,
    };
    let shift = head.next_multiple_of(LINE_BYTES) - head;
    u32::try_from(shift).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_begin_where_those_of_the_cache_do() {
        let told =
            |memlock: usize| shift_of(&format!("pos:\t0\nmemlock:\t{memlock}\nmap_id:\t7\n"));
        assert_eq!(told(312 + LINE_BYTES), 8);
        assert_eq!(told(320 + LINE_BYTES), 0);
        assert_eq!(told(272 + LINE_BYTES), 48);
        // Rounded, or not told: what older kernels have.
        assert_eq!(told(4_096), 48);
        assert_eq!(shift_of(""), 48);
    }
}
