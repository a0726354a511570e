//! Schedulers, and what a virtual server gets where the kernel lacks the one that it should have. Pure.

use std::collections::BTreeSet;

use ipvs_netlink::{Flags, Service};

/// The scheduler of Services that name none, and the last resort of all others. The mode needs it.
pub const DEFAULT: &str = "rr";

/// Maglev hashing: of the client's address where persistence is not to be had.
pub const AFFINE: &str = "mh";

/// Hashing of the client's address by the oldest means; its flags mean what those of [`AFFINE`] mean.
const HASHING: &str = "sh";

/// The service with a scheduler that the kernel has: its own, or the nearest to it.
pub fn available(service: &Service, lacking: &BTreeSet<String>) -> Service {
    let mut service = service.clone();
    while lacking.contains(&service.scheduler) && service.scheduler != DEFAULT {
        if service.scheduler == AFFINE {
            HASHING.clone_into(&mut service.scheduler);
        } else {
            DEFAULT.clone_into(&mut service.scheduler);
            service.flags = Flags { scheduler: [false; 3], ..service.flags };
        }
    }
    service
}

/// Says which scheduler the kernel lacks, and what that needs.
pub fn missing(scheduler: &str) -> String {
    format!("the kernel has no scheduler {scheduler} (module ip_vs_{scheduler})")
}

#[cfg(test)]
mod tests {
    use ipvs_netlink::ServiceKey;

    use super::*;

    #[test]
    fn a_scheduler_that_is_missing_is_replaced_by_the_nearest() {
        let key = ServiceKey::Mark { ipv6: false, mark: 1 };
        let chosen = |scheduler: &str, lacking: &[&str]| {
            let mut service = Service::new(key, scheduler);
            service.flags.scheduler = [true, false, false];
            let service = available(&service, &lacking.iter().map(|&s| s.to_owned()).collect());
            (service.scheduler, service.flags.scheduler[0])
        };
        assert_eq!(chosen("mh", &["lc"]), ("mh".to_owned(), true));
        assert_eq!(chosen("mh", &["mh"]), ("sh".to_owned(), true));
        assert_eq!(chosen("mh", &["mh", "sh"]), ("rr".to_owned(), false));
        assert_eq!(chosen("lc", &["lc"]), ("rr".to_owned(), false));
        // There is nothing else to take: the kernel will say so.
        assert_eq!(chosen("lc", &["lc", "rr"]), ("rr".to_owned(), false));
    }
}
