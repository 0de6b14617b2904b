"""Attacks below HTTP and TLS: protocols, addresses, privileges. Every rule is wide open: only the gate stops them."""

from __future__ import annotations

from typing import Any

import pytest

from system.egress.attacks import denials, others, packet, run_attacks

pytestmark = pytest.mark.system

ALLOW_ALL = [{"access": "allow", "host": "*"}]
REFUSED = {"EPERM", "EACCES", "EHOSTUNREACH", "ECONNREFUSED", "ECONNRESET"}

PROTOCOLS = """
def datagram(target, family=socket.AF_INET, protocol=0, data=b"x" * 64, prepare=None):
    with socket.socket(family, socket.SOCK_DGRAM, protocol) as sock:
        if prepare is not None:
            prepare(sock)
        sock.sendto(data, target)
        sock.connect(target)
        sock.send(data)
        return sock.recv(1500).hex()

attack(datagram, ("8.8.8.8", 123), name="udp")
attack(datagram, ("8.8.8.8", 443), socket.AF_INET, 0, b"\\xc0\\0\\0\\0\\1" + bytes(1195), name="quic")
attack(datagram, ("8.8.8.8", 9999), socket.AF_INET, 0, bytes(60000), name="udp in fragments")
attack(datagram, ("8.8.8.8", 124), socket.AF_INET, 136, name="udp-lite")
attack(datagram, ("2001:4860:4860::8888", 443), socket.AF_INET6, name="udp over IPv6")
attack(datagram, ("2001:4860:4860::8888", 53), socket.AF_INET6, name="names over IPv6")
attack(datagram, ("::ffff:8.8.8.8", 125), socket.AF_INET6, name="udp to a mapped address")
attack(datagram, ("224.0.0.251", 5353), name="mdns")
attack(datagram, ("ff02::fb", 5353, 0, 1), socket.AF_INET6, name="mdns over IPv6")
attack(datagram, ("239.255.255.250", 1900), name="ssdp")
attack(datagram, ("255.255.255.255", 67), socket.AF_INET, 0, b"x",
       lambda sock: sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1), name="broadcast")
attack(datagram, ("169.254.169.254", 80), name="udp to metadata")
attack(datagram, ("11.0.0.3", 15001), name="udp to the gate")
attack(datagram, ("11.0.0.3", 15053), name="the resolver's own port")
attack(datagram, ("8.8.8.8", 126), socket.AF_INET, 0, b"x",
       lambda sock: sock.bind(("127.0.0.1", 0)), name="udp from loopback")
attack(exchange, b"GET / HTTP/1.1\\r\\n\\r\\n", ("2001:4860:4860::8888", 80), socket.AF_INET6, name="tcp over IPv6")
attack(exchange, b"GET / HTTP/1.1\\r\\n\\r\\n", ("fd00:ec2::254", 80), socket.AF_INET6, name="metadata over IPv6")
attack(exchange, b"GET / HTTP/1.1\\r\\n\\r\\n", ("fe80::1", 80, 0, 1), socket.AF_INET6, name="a zone")
attack(exchange, b"x", ("11.0.0.3", 15001), name="the gate's listener itself")
attack(exchange, b"x", ("11.0.0.3", 15053), name="the resolver's listener itself")
attack(exchange, b"x", ("11.0.0.3", 10000), name="another port of the gate")
attack(exchange, b"x", ("9.9.9.9", 83), socket.AF_INET, lambda sock: sock.bind(("11.0.0.3", 0)), name="from the gate")
"""

RECORDED = {
    packet("udp", "8.8.8.8:123"),
    packet("udp", "8.8.8.8:443"),
    packet("udp", "8.8.8.8:9999"),
    packet("udplite", "8.8.8.8:124"),
    packet("udp", "[2001:4860:4860::8888]:443"),
    packet("udp", "[2001:4860:4860::8888]:53"),
    packet("udp", "8.8.8.8:125"),
    packet("udp", "224.0.0.251:5353"),
    packet("udp", "[ff02::fb]:5353"),
    packet("udp", "239.255.255.250:1900"),
    packet("udp", "255.255.255.255:67"),
    packet("udp", "169.254.169.254:80"),
    packet("udp", "11.0.0.3:15001"),
    packet("udp", "11.0.0.3:15053"),
    packet("udp", "8.8.8.8:126"),
    packet("tcp", "[2001:4860:4860::8888]:80"),
    packet("tcp", "[fd00:ec2::254]:80"),
    packet("tcp", "[fe80::1]:80"),
    packet("tcp", "11.0.0.3:15001"),
    packet("tcp", "11.0.0.3:15053"),
    packet("tcp", "11.0.0.3:10000"),
    packet("tcp", "9.9.9.9:83"),
}


async def test_packets_that_no_rule_can_judge_are_refused_at_once_and_recorded(sandboxes: Any) -> None:
    sandbox = await sandboxes(egress=ALLOW_ALL)
    outcomes = await run_attacks(sandbox, PROTOCOLS)
    assert others(outcomes, REFUSED) == {}
    assert denials(await sandbox.events()) == RECORDED


SOCKETS = """
def made(family, kind, protocol=0):
    socket.socket(family, kind, protocol).close()
    return "made"
def option(level, number, value):
    with socket.socket() as sock:
        sock.setsockopt(level, number, value)
        return "set"
attack(made, socket.AF_INET, socket.SOCK_RAW, 1, name="raw icmp")
attack(made, socket.AF_INET, socket.SOCK_RAW, 255, name="raw ip")
attack(made, socket.AF_INET6, socket.SOCK_RAW, 58, name="raw icmp over IPv6")
attack(made, socket.AF_INET, socket.SOCK_DGRAM, 1, name="ping")
attack(made, socket.AF_PACKET, socket.SOCK_RAW, 0x300, name="packet")
attack(made, socket.AF_PACKET, socket.SOCK_DGRAM, 0x300, name="cooked packet")
attack(made, socket.AF_INET, socket.SOCK_STREAM, 132, name="sctp")
attack(made, socket.AF_INET, socket.SOCK_SEQPACKET, 132, name="sctp packets")
attack(made, socket.AF_INET, 6, 33, name="dccp")
attack(made, socket.AF_VSOCK, socket.SOCK_STREAM, name="vsock")
attack(made, 38, socket.SOCK_SEQPACKET, name="kernel crypto")
attack(made, 29, socket.SOCK_RAW, name="can")
attack(made, 31, socket.SOCK_RAW, name="bluetooth")
attack(made, 30, socket.SOCK_STREAM, name="tipc")
attack(made, 44, socket.SOCK_RAW, name="xdp")
attack(option, socket.SOL_SOCKET, 36, 0x68697672, name="mark")
attack(option, socket.IPPROTO_IP, 19, 1, name="transparent")
attack(option, socket.SOL_SOCKET, 33, 1, name="force buffer")
attack(option, socket.IPPROTO_IP, socket.IP_OPTIONS, bytes((131, 7, 4, 8, 8, 8, 8, 0)), name="loose source route")
attack(option, socket.IPPROTO_IP, socket.IP_OPTIONS, bytes((137, 7, 4, 8, 8, 8, 8, 0)), name="strict source route")
attack(option, socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0", name="bind to a device")
"""


async def test_sockets_below_tcp_and_udp_cannot_be_made(sandboxes: Any) -> None:
    """Nothing to record: the call fails, and no packet exists."""
    sandbox = await sandboxes(egress=ALLOW_ALL)
    outcomes = await run_attacks(sandbox, SOCKETS)
    refusals = {"EPERM", "EACCES", "EPROTONOSUPPORT", "ESOCKTNOSUPPORT", "EAFNOSUPPORT", "ENODEV"}
    assert others(outcomes, refusals) == {}
    assert await sandbox.events() == []


NETWORK = """
NEWUSER, NEWNET = 0x10000000, 0x40000000
for name in ("net/ipv4/ip_forward", "net/ipv4/conf/all/route_localnet", "net/ipv4/conf/all/accept_source_route",
             "net/ipv4/conf/lo/rp_filter", "net/ipv4/tcp_fastopen", "net/ipv4/ip_nonlocal_bind",
             "net/ipv6/conf/all/seg6_enabled", "net/netfilter/nf_log/7"):
    attack(lambda: open("/proc/sys/" + name, "w").write("1") and "written", name="sysctl " + name)
attack(lambda: os.mkdir("/sys/class/net/x"), name="sysfs")
attack(command, "mount", "-o", "remount,rw", "/proc/sys", name="remount")
attack(command, "ip", "route", "add", "8.8.8.8/32", "dev", "lo", name="route")
attack(command, "ip", "address", "add", "8.8.8.8/32", "dev", "lo", name="address")
attack(command, "ip", "link", "set", "lo", "down", name="link")
attack(command, "ip", "link", "add", "tap0", "type", "dummy", name="device")
attack(command, "ip", "rule", "add", "from", "all", "lookup", "99", name="rule")
attack(command, "nft", "flush", "ruleset", name="nft")
attack(command, "iptables", "-t", "nat", "-F", name="iptables")
def netlink(protocol, kind, flags, body):
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol) as sock:
        sock.bind((0, 0))
        sock.send(struct.pack("=IHHII", 16 + len(body), kind, flags | 5, 1, 0) + body)
        number = -struct.unpack_from("=i", sock.recv(65536), 16)[0]
        if number:
            raise OSError(number, "")
        return "done"
attack(netlink, 0, 24, 0x400, struct.pack("=BBBBBBBBI", 2, 0, 0, 0, 254, 4, 253, 1, 0) + struct.pack("=HHi", 8, 4, 1),
       name="netlink route")
attack(netlink, 0, 20, 0x400, struct.pack("=BBBBi", 2, 32, 0, 0, 1) + struct.pack("=HH", 8, 2) + bytes((8, 8, 8, 8)),
       name="netlink address")
attack(netlink, 12, 0xA02, 0, struct.pack("=BBH", 1, 0, 0), name="netlink tables")
attack(netlink, 12, 0x401, 0, struct.pack("!BBH", 0, 0, 7) + struct.pack("=HHI", 5, 1, 1), name="packet log")
attack(netlink, 12, 0x102, 0, struct.pack("!BBH", 2, 0, 0), name="connection table")
attack(syscall, 272, NEWNET, name="unshare network")
attack(syscall, 272, NEWUSER | NEWNET, name="unshare user and network")
attack(syscall, 56, NEWUSER | NEWNET | 17, 0, 0, 0, 0, name="clone")
def enter(path):
    descriptor = os.open(path, os.O_RDONLY)
    return syscall(308, descriptor, 0)
attack(enter, "/proc/self/ns/net", name="setns to its own")
attack(enter, "/proc/1/ns/net", name="setns to the first process's")
attack(enter, "/proc/thread-self/ns/user", name="setns user")
attack(os.open, "/dev/net/tun", os.O_RDWR, name="tun")
attack(lambda: os.mknod("/tmp/tun", 0o20666, os.makedev(10, 200)), name="make tun")
attack(lambda: os.open("/proc/1/root/proc/sys/net/ipv4/ip_forward", os.O_WRONLY), name="through the root link")
with open("/proc/self/status") as status:
    outcomes["capabilities"] = next(line.split()[1] for line in status if line.startswith("CapEff"))
with open("/proc/net/dev") as devices:
    outcomes["devices"] = [line.split(":")[0].strip() for line in devices][2:]
attack(exchange, b"x", ("2001:4860:4860::8888", 80), socket.AF_INET6, name="still closed")
"""

NETWORK_ADMINISTRATION = 1 << 12 | 1 << 13 | 1 << 21
"""CAP_NET_ADMIN, CAP_NET_RAW, CAP_SYS_ADMIN."""


async def test_root_inside_changes_no_route_rule_address_or_namespace(sandboxes: Any) -> None:
    """Nothing to record: each call fails. The gate still stands afterwards."""
    sandbox = await sandboxes(egress=ALLOW_ALL)
    outcomes = await run_attacks(sandbox, NETWORK)
    assert int(outcomes.pop("capabilities"), 16) & NETWORK_ADMINISTRATION == 0
    assert "lo" in outcomes["devices"]
    assert not [name for name in outcomes.pop("devices") if name.startswith(("eth", "en", "veth"))]
    assert outcomes.pop("still closed") in REFUSED
    refusals = {"EPERM", "EACCES", "EROFS", "ENOENT", "EINVAL"}
    failed = others(outcomes, refusals)
    assert {name: code for name, code in failed.items() if not isinstance(code, int) or code == 0} == {}
    assert denials(await sandbox.events()) == {packet("tcp", "[2001:4860:4860::8888]:80")}


OWN = """
listener = socket.create_server(("0.0.0.0", 7000))
threading.Thread(target=lambda: [listener.accept()[0].sendall(b"mine") for _ in range(4)], daemon=True).start()
def own(address, source=None):
    with socket.create_connection((address, 7000), source_address=(source, 0) if source else None) as sock:
        return sock.recv(16).decode()
attack(own, "127.0.0.1", name="loopback")
attack(own, "127.255.0.9", name="an alias of loopback")
attack(own, "11.0.0.2", name="its own address")
attack(own, "11.0.0.2", "127.0.0.5", name="from an alias")
"""


async def test_the_sandbox_reaches_itself_without_a_judgement(sandboxes: Any) -> None:
    sandbox = await sandboxes(egress=[])
    outcomes = await run_attacks(sandbox, OWN)
    assert others(outcomes, {"mine"}) == {}
    assert await sandbox.events() == []
