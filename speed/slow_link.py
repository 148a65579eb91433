"""
bench.py --shard over a slow network, on one machine: two processes, each in a network namespace of its own.

    sudo python -m speed.slow_link --gbit=1 --latency_us=500 config/train_gpt2_12comm.py --with config/cpu.py

A veth pair joins the namespaces; tc's tbf limits the rate both ways, and netem delays if the kernel has it.
If not, there are two veth pairs, and a relay in this process delays every frame on its way from one to the
other. All other arguments go to bench.py, which measures alpha and beta of the link as it is, and predicts
for the link as it was asked for. If no link can be made, the bench runs over loopback and only predicts.

This needs root, and ip and tc, which are part of iproute2. The namespaces have no names and belong to this
process, so that the kernel removes them when it ends, however it ends; the machine's own network is not
touched.
"""

import argparse
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from select import select
from threading import Thread

from configurator import ROOT, begin_program, fail

ADDRESSES = '10.77.0.1', '10.77.0.2'
MTU = 9000  # bytes
CLONE_NEWNET = 0x40000000  # linux/sched.h
PR_SET_PDEATHSIG = 1  # linux/prctl.h
SOL_PACKET, PACKET_VNET_HDR, PACKET_IGNORE_OUTGOING = 263, 15, 23  # linux/if_packet.h
SO_RCVBUFFORCE = 33  # asm-generic/socket.h
ETH_P_ALL = 3  # linux/if_ether.h

libc = ctypes.CDLL(None, use_errno=True)


# namespaces: each is held by an open file, so they end with this process


def check(status):
    """Raise what a failed call of libc left in errno."""
    if status:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def new_namespace():
    """Move this thread to a new network namespace. Returns a file that holds it."""
    check(libc.unshare(CLONE_NEWNET))
    return open('/proc/thread-self/ns/net')


def enter(namespace):
    check(libc.setns(namespace.fileno(), CLONE_NEWNET))


def run(command, namespace):
    """Run a command of ip or tc inside a namespace. Raises OSError, with its stderr, if it fails."""
    done = subprocess.run(command.split(), preexec_fn=lambda: enter(namespace),
                          capture_output=True, text=True)
    if done.returncode:
        raise OSError(f'{command}: {done.stderr.strip()}')


def has_netem(namespace):
    try:
        run('tc qdisc add dev lo root netem delay 1us', namespace)
        run('tc qdisc del dev lo root', namespace)
        return True
    except OSError:
        return False


def make_link(gbit, latency_us):
    """
    Two namespaces with an eth0 each, at ADDRESSES, joined by a link of that rate and latency per message.

    Returns them, as files, and what the link is made of, in words. Raises OSError if the system cannot.
    """
    ends, middle = [new_namespace(), new_namespace()], new_namespace()
    netem = latency_us > 0 and has_netem(ends[0])
    relayed = latency_us > 0 and not netem
    paths = [f'/proc/{os.getpid()}/fd/{end.fileno()}' for end in ends]
    if relayed:
        for i, path in enumerate(paths):
            run(f'ip link add relay{i} mtu {MTU} up type veth peer name eth0 mtu {MTU} netns {path}', middle)
    else:
        eth0 = [f'eth0 mtu {MTU} netns {path}' for path in paths]
        run(f'ip link add {eth0[0]} type veth peer name {eth0[1]}', middle)
    for end, address in zip(ends, ADDRESSES):
        run('ip link set lo up', end)
        run(f'ip address add {address}/24 dev eth0', end)
        run('ip link set eth0 up', end)
        if netem:
            run(f'tc qdisc add dev eth0 root handle 1: netem delay {latency_us}us limit 100000', end)
        # a burst of one frame, and a queue longer than TCP's window, so that nothing is lost
        run(f'tc qdisc add dev eth0 {"parent 1:1" if netem else "root"} tbf rate {gbit * 1e9:.0f}bit '
            f'burst {MTU + 14} limit 64mb', end)
    if relayed:
        Thread(target=relay, args=(latency_us * 1e-6,), daemon=True).start()
    delay = f'{"netem" if netem else "a relay"} for {latency_us:g} us' if latency_us else 'no delay'
    return ends, f'veth with an MTU of {MTU}, tbf at {gbit:g} Gbit/s, {delay}'


def relay(seconds):
    """Pass frames from relay0 to relay1 and back, each `seconds` after it came. Never returns."""
    sides = []
    for i in range(2):
        side = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
        side.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)  # checksums that veth left to hardware
        side.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
        side.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 2**26)
        side.bind((f'relay{i}', ETH_P_ALL))
        sides.append(side)
    waiting = deque()  # (when it is due, to which side, frame)
    while True:
        ready = select(sides, [], [], max(waiting[0][0] - time.monotonic(), 0) if waiting else None)[0]
        for side in ready:
            frame = side.recv(2**17)
            waiting.append((time.monotonic() + seconds, sides[side is sides[0]], frame))
        while waiting and waiting[0][0] <= time.monotonic():
            _, side, frame = waiting.popleft()
            side.send(frame)


# the two processes


def start(i, namespace, address, interface, arguments):
    """Start bench.py --shard as process i of two that meet at the address. It dies with this process."""
    torchrun = dict(RANK=i, LOCAL_RANK=i, GROUP_RANK=i, WORLD_SIZE=2, GROUP_WORLD_SIZE=2, LOCAL_WORLD_SIZE=1,
                    MASTER_ADDR=address, MASTER_PORT=29577, GLOO_SOCKET_IFNAME=interface)
    threads = dict(OMP_NUM_THREADS=max(os.cpu_count() // 2, 1))
    env = {key: str(value) for key, value in (threads | dict(os.environ) | torchrun).items()}

    def prepare():
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        enter(namespace)

    command = [sys.executable, ROOT / 'bench.py', '--shard', '--backend=gloo', *arguments]
    return subprocess.Popen(command, env=env, preexec_fn=prepare)


def parse_args(argv):
    """(args, arguments for bench.py)"""
    parser = argparse.ArgumentParser(
        prog='python -m speed.slow_link', description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog='All other arguments go to bench.py; see python bench.py --help.')
    parser.error = lambda message: fail(f'{message}; see python -m speed.slow_link --help')
    parser.add_argument('--gbit', type=float, required=True, help='Gbit/s, each way')
    parser.add_argument('--latency_us', type=float, default=0.0, help='latency of a message, in microseconds')
    args, arguments = parser.parse_known_args(argv)
    if not 0 < args.gbit < 1000:
        fail(f'--gbit is {args.gbit:g}, it must be above 0 and below 1000')
    if not 0 <= args.latency_us < 1e6:
        fail(f'--latency_us is {args.latency_us:g}, it must be at least 0 and below a million')
    return args, [*arguments, f'--gbit={args.gbit}', f'--latency_us={args.latency_us}']


def main(argv):
    args, arguments = parse_args(argv)
    if os.geteuid():
        fail('a network namespace needs root; without it, bench.py --shard --gbit=... predicts')
    for tool in ('ip', 'tc'):
        if shutil.which(tool) is None:
            fail(f'{tool} is missing, which is part of iproute2: apt install iproute2')
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    home = open('/proc/thread-self/ns/net')
    try:
        namespaces, link = make_link(args.gbit, args.latency_us)
        meeting = ADDRESSES[0], 'eth0'
        print(f'link: {link}', flush=True)
    except OSError as error:
        namespaces, meeting = [home, home], ('127.0.0.1', 'lo')
        print(f'link: it could not be made ({error}). What is measured here is loopback; '
              f'{args.gbit:g} Gbit/s and {args.latency_us:g} us are only predicted', flush=True)
    processes = [start(i, namespace, *meeting, arguments) for i, namespace in enumerate(namespaces)]
    try:
        while any(process.poll() is None for process in processes):
            if any(process.returncode for process in processes):
                break  # one has failed, and the other would wait for it
            time.sleep(0.2)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    sys.exit(any(process.returncode for process in processes))


if __name__ == '__main__':
    begin_program()
    main(sys.argv[1:])
