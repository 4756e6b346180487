//! Page table of the latent cache: how many sequences hold each page.
//!
//! Knows no tensors and no sequences; it hands out page numbers, and `model::cache` owns the
//! memory.
//!
//! Invariants:
//!   * free pages + held pages == page count
//!   * a page's holder count is zero exactly when the page is free
//!   * only a page with one holder is written to

/// Whether a holder may write to its page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Write {
    /// Nobody else holds the page.
    InPlace,
    /// Others hold the page too: the writer takes a new page, copies, and releases this one.
    Copy,
}

/// Holder counts of all pages.
#[derive(Debug)]
pub struct PageTable {
    holders: Vec<u32>,
    /// Free pages; the last one is handed out next.
    free: Vec<u32>,
    high_water: usize,
}

impl PageTable {
    /// A table of `page_count` free pages.
    pub fn new(page_count: usize) -> PageTable {
        let last = u32::try_from(page_count).expect("page numbers are 32 bits wide");
        PageTable { holders: vec![0; page_count], free: (0..last).rev().collect(), high_water: 0 }
    }

    /// Number of pages.
    pub fn page_count(&self) -> usize {
        self.holders.len()
    }

    /// Pages without a holder.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// Pages with a holder; a shared page counts once.
    pub fn held(&self) -> usize {
        self.page_count() - self.free()
    }

    /// Most pages ever held at once.
    pub fn high_water(&self) -> usize {
        self.high_water
    }

    /// Takes a free page for one holder, if there is one.
    pub fn alloc(&mut self) -> Option<u32> {
        let page = self.free.pop()?;
        self.holders[page as usize] = 1;
        self.high_water = self.high_water.max(self.held());
        Some(page)
    }

    /// Adds a holder to a held page.
    pub fn share(&mut self, page: u32) {
        let holders = &mut self.holders[page as usize];
        assert!(*holders > 0, "page {page} is free and cannot be shared");
        *holders += 1;
    }

    /// Takes a holder away; the last one frees the page.
    pub fn release(&mut self, page: u32) {
        let holders = &mut self.holders[page as usize];
        assert!(*holders > 0, "page {page} is free and cannot be released");
        *holders -= 1;
        if *holders == 0 {
            self.free.push(page);
        }
    }

    /// What a holder of `page` must do before it writes there.
    pub fn write(&self, page: u32) -> Write {
        match self.holders[page as usize] {
            0 => panic!("page {page} is free and cannot be written to"),
            1 => Write::InPlace,
            _ => Write::Copy,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// One step of a random history; the numbers choose among the pages held at that time.
    #[derive(Clone, Debug)]
    enum Step {
        Alloc,
        Share(usize),
        Release(usize),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            3 => Just(Step::Alloc),
            2 => any::<usize>().prop_map(Step::Share),
            4 => any::<usize>().prop_map(Step::Release),
        ];
        prop::collection::vec(step, 0..200)
    }

    proptest! {
        #![proptest_config(super::super::oracle::fixed(256))]
        #[test]
        fn any_history_keeps_the_invariants(count in 0usize..12, steps in steps()) {
            let mut table = PageTable::new(count);
            // The naive model: one entry per (holder, page).
            let mut held: Vec<u32> = Vec::new();
            let mut most = 0;
            for step in steps {
                match step {
                    Step::Alloc => match table.alloc() {
                        Some(page) => {
                            prop_assert!(!held.contains(&page), "page {} was handed out twice", page);
                            held.push(page);
                        }
                        None => prop_assert!((0..count as u32).all(|p| held.contains(&p))),
                    },
                    Step::Share(choice) if !held.is_empty() => {
                        let page = held[choice % held.len()];
                        table.share(page);
                        held.push(page);
                    }
                    Step::Release(choice) if !held.is_empty() => {
                        table.release(held.swap_remove(choice % held.len()));
                    }
                    Step::Share(_) | Step::Release(_) => {}
                }
                let distinct = (0..count as u32).filter(|p| held.contains(p)).count();
                most = most.max(distinct);
                prop_assert_eq!((table.held(), table.free()), (distinct, count - distinct));
                prop_assert_eq!(table.high_water(), most);
                for page in &held {
                    let alone = held.iter().filter(|p| *p == page).count() == 1;
                    prop_assert_eq!(table.write(*page), if alone { Write::InPlace } else { Write::Copy });
                }
            }
        }
    }

    #[test]
    fn pages_are_handed_out_from_the_lowest_number() {
        let mut table = PageTable::new(3);
        let pages: Vec<_> = (0..4).map(|_| table.alloc()).collect();
        assert_eq!(pages, [Some(0), Some(1), Some(2), None]);
    }

    #[test]
    #[should_panic(expected = "page 0 is free and cannot be released")]
    fn a_page_released_twice_is_our_own_mistake() {
        let mut table = PageTable::new(1);
        let page = table.alloc().unwrap();
        table.release(page);
        table.release(page);
    }

    #[test]
    #[should_panic(expected = "cannot be shared")]
    fn a_free_page_cannot_be_shared() {
        PageTable::new(1).share(0);
    }
}
