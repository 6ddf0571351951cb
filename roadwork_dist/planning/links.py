"""Bandwidth and latency of links between GPUs, from published figures."""

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Link:
    """A link between two GPUs.

    Attributes:
        name: common name.
        bandwidth: bytes per second in one direction.
        latency: additional seconds per hop of a ring, and per hop of a tree.
        source: where the figures are published.
    """

    name: str
    bandwidth: float
    latency: tuple[float, float]
    source: str


# Data sheets give NVLink and PCIe as the sum of both directions. Latencies are those that NCCL's own
# model uses per hop of a ring and of a tree (src/graph/tuning.cc, hwLat, protocol LL128).
_HOP_NVLINK, _HOP_PCI, _HOP_NETWORK = (1.9e-6, 1.25e-6), (2.5e-6, 1.9e-6), (4.0e-6, 8.5e-6)

LINKS: Mapping[str, Link] = {
    link.name: link
    for link in (
        Link("NVLink 5", 900e9, _HOP_NVLINK, "NVIDIA HGX B200 data sheet: 1.8 TB/s a GPU"),
        Link("NVLink 4", 450e9, _HOP_NVLINK, "NVIDIA H100 data sheet: 900 GB/s a GPU"),
        Link("NVLink 3", 300e9, _HOP_NVLINK, "NVIDIA A100 data sheet: 600 GB/s a GPU"),
        Link("PCIe 5 x16", 63e9, _HOP_PCI, "PCI-SIG: 32 GT/s a lane, 128b/130b"),
        Link("PCIe 4 x16", 31.5e9, _HOP_PCI, "PCI-SIG: 16 GT/s a lane, 128b/130b"),
        Link("InfiniBand XDR", 100e9, _HOP_NETWORK, "NVIDIA ConnectX-8 data sheet: 800 Gb/s a port"),
        Link("InfiniBand NDR", 50e9, _HOP_NETWORK, "NVIDIA ConnectX-7 data sheet: 400 Gb/s a port"),
        Link("InfiniBand HDR", 25e9, _HOP_NETWORK, "NVIDIA ConnectX-6 data sheet: 200 Gb/s a port"),
        Link("Ethernet 100G", 12.5e9, _HOP_NETWORK, "IEEE 802.3: 100 Gb/s"),
        Link("Ethernet 25G", 3.125e9, _HOP_NETWORK, "IEEE 802.3: 25 Gb/s"),
    )
}
"""Links by name."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Identical machines.

    Attributes:
        gpus_per_node: GPUs per machine.
        inside: link between the GPUs of a machine.
        between: link of one network card.
        cards: network cards per machine.
        host: link of a GPU to the memory of its machine.
    """

    gpus_per_node: int = 8
    inside: Link = LINKS["NVLink 4"]
    between: Link = LINKS["InfiniBand NDR"]
    cards: int = 8
    host: Link = LINKS["PCIe 5 x16"]

    def nodes(self, ranks: int) -> int:
        """Machines needed for ``ranks`` ranks."""
        return -(-ranks // self.gpus_per_node)

    def bandwidth(self, ranks: int) -> float:
        """Bytes per second that a rank can pass on around a ring of ``ranks`` ("bus bandwidth").

        A ring enters and leaves a machine once. NCCL runs as many rings as there are cards, so
        between machines all cards of a machine share the traffic of one rank (nccl-tests,
        doc/PERFORMANCE.md).
        """
        if self.nodes(ranks) == 1:
            return self.inside.bandwidth
        return min(self.inside.bandwidth, self.cards * self.between.bandwidth)

    def ring_latency(self, ranks: int) -> float:
        """Seconds that an empty message takes from the first to the last rank of a ring."""
        between = self.nodes(ranks) - 1
        inside = ranks - 1 - between
        return inside * self.inside.latency[0] + between * self.between.latency[0]

    def tree_latency(self, ranks: int) -> float:
        """Seconds up a tree of machines, each with its ranks in a chain, as NCCL builds it."""
        inside = min(ranks, self.gpus_per_node) - 1
        between = math.ceil(math.log2(self.nodes(ranks)))
        return inside * self.inside.latency[1] + between * self.between.latency[1]


DGX_H100 = Cluster()
"""Eight H100 SXM with NVLink 4 and eight InfiniBand NDR cards per machine (NVIDIA DGX H100 data sheet)."""
