//! Why a packet passed or not: one name per cause, the same in counters, `explain` and tests.

macro_rules! outcomes {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $text:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq)]
        #[cfg_attr(not(target_arch = "bpf"), derive(Debug, PartialOrd, Ord, Hash))]
        #[repr(u8)]
        pub enum $name { $($(#[$variant_doc])* $variant,)* }

        impl $name {
            /// All of them, in the order of their counters.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// The stable name.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $text,)* }
            }
        }
    };
}

outcomes! {
    /// Why a packet was dropped.
    Reason {
        /// No policy is active (never was, or the active word is gone).
        NoPolicy = "no_policy",
        /// A policy is active, but a table of it is missing.
        TableMissing = "table_missing",
        /// The packet ends before its headers do.
        Truncated = "truncated",
        /// Neither IPv4 nor IPv6.
        IpVersion = "ip_version",
        /// An IP header whose lengths contradict each other.
        IpHeader = "ip_header",
        /// IPv6 extension headers that are unknown, out of place, too many, or end in nothing.
        ExtensionHeader = "extension_header",
        /// An address that no packet from a network may carry: loopback, unspecified, embedded
        /// IPv4.
        Martian = "martian",
        /// To or from a multicast or broadcast address.
        Multicast = "multicast",
        /// To or from a link-local address.
        LinkLocal = "link_local",
        /// Ingress from an address that no peer has.
        SourceUnknown = "source_unknown",
        /// Ingress from the node's own address, or egress from one that is not its own.
        SourceForged = "source_forged",
        /// Ingress to an address that is not the node's, or behind it.
        DestinationNotOurs = "destination_not_ours",
        /// Egress to an address that no peer has.
        DestinationUnknown = "destination_unknown",
        /// No rule allows it.
        Policy = "policy",
        /// A flow that policy allowed before and no longer does.
        Revoked = "revoked",
        /// TCP flags that no valid segment carries together.
        TcpFlags = "tcp_flags",
        /// A TCP segment that cannot open a flow, of no flow.
        TcpNoFlow = "tcp_no_flow",
        /// A pure ACK that policy allows, but too many flows were picked up lately.
        PickedUpQuota = "picked_up_quota",
        /// An SCTP packet other than INIT, of no flow.
        SctpNoFlow = "sctp_no_flow",
        /// An ICMP answer that nobody asked for.
        IcmpNoFlow = "icmp_no_flow",
        /// An ICMP message that is neither question, answer nor error.
        IcmpType = "icmp_type",
        /// An ICMP error that does not embed a packet of a live flow.
        IcmpUnrelated = "icmp_unrelated",
        /// A first fragment without the whole transport header.
        FragmentTiny = "fragment_tiny",
        /// A later fragment that reaches into the transport header.
        FragmentOverlap = "fragment_overlap",
        /// A later fragment whose first one did not pass.
        FragmentNoState = "fragment_no_state",
        /// The flow table took no more.
        FlowTableFull = "flow_table_full",
    }
}

outcomes! {
    /// Why a packet passed.
    Accepted {
        /// It belongs to a known flow.
        Established = "established",
        /// Policy allowed it as a first packet.
        New = "new",
        /// Policy allows its flow, whose beginning was not seen.
        PickedUp = "picked_up",
        /// An ICMP error about a live flow.
        Related = "related",
        /// A later fragment of a datagram that passed.
        Fragment = "fragment",
    }
}

/// Number of counters of one direction.
pub const OUTCOMES: u32 = (Accepted::ALL.len() + Reason::ALL.len()) as u32;
