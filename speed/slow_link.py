"""
bench.py --shard over a slow network, on one machine: two processes, each in a network namespace of its own.

    sudo python slow_link.py --gbit=1 --latency_us=500 config/train_gpt2_12comm.py --with config/cpu.py

A veth pair joins the namespaces; tc's tbf limits the rate both ways, and netem delays where the kernel has
it. Where it has not, there are two veth pairs, and a relay in here holds every frame back on its way from one
to the other. Whatever else is on the command line goes to bench.py, which measures alpha and beta of the link
that came of it, and predicts for the link that was asked for. A link that cannot be made is predicted only.

This needs root, and ip and tc, which are iproute2's. The namespaces have no names and belong to this process,
so that the kernel takes all of it away with it, however it ends; the machine's own network is not touched.
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

from configurator import ROOT, fail

ADDRESSES = '10.77.0.1', '10.77.0.2'
MTU = 9000                              # bytes
CLONE_NEWNET = 0x40000000               # linux/sched.h
PR_SET_PDEATHSIG = 1                    # linux/prctl.h
SOL_PACKET, PACKET_VNET_HDR, PACKET_IGNORE_OUTGOING, SO_RCVBUFFORCE = 263, 15, 23, 33   # linux/if_packet.h
ETH_P_ALL = 3                           # linux/if_ether.h

libc = ctypes.CDLL(None, use_errno=True)


# namespaces: a file descriptor holds each, so they end with this process


def new_namespace():
    """Moves this thread to a new network namespace. Returns a file that holds it."""
    if libc.unshare(CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return open('/proc/thread-self/ns/net')


def enter(namespace):
    if libc.setns(namespace.fileno(), CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def run(command, namespace):
    """A command of ip or tc inside a namespace. Raises OSError, with what it said, where it fails."""
    done = subprocess.run(command.split(), preexec_fn=lambda: enter(namespace), capture_output=True,
                          text=True)
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
    Two namespaces with an eth0 each, at ADDRESSES, joined by a link of that rate and latency a message.
    Returns them, as files, and in words what the link is made of. Raises OSError where the system will not.
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
        # one frame may go at once; the queue is longer than what TCP has under way, so that nothing is lost
        run(f'tc qdisc add dev eth0 {"parent 1:1" if netem else "root"} tbf rate {gbit * 1e9:.0f}bit '
            f'burst {MTU + 14} limit 64mb', end)
    if relayed:
        Thread(target=relay, args=(latency_us * 1e-6,), daemon=True).start()
    delay = f'{"netem" if netem else "a relay"} for {latency_us:g} us' if latency_us else 'no delay'
    return ends, f'veth with an MTU of {MTU}, tbf at {gbit:g} Gbit/s, {delay}'


def relay(seconds):
    """Hands the frames from relay0 to relay1 and back, each so many seconds after it came. Never returns."""
    sides = []
    for i in range(2):
        side = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
        side.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)         # checksums that veth left to hardware
        side.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
        side.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 2**26)
        side.bind((f'relay{i}', ETH_P_ALL))
        sides.append(side)
    waiting = deque()                   # (when it is due, to which side, frame)
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
    """bench.py --shard as process i of two, which meet at the address. It dies with this process."""
    torchrun = dict(RANK=i, LOCAL_RANK=i, GROUP_RANK=i, WORLD_SIZE=2, GROUP_WORLD_SIZE=2, LOCAL_WORLD_SIZE=1,
                    MASTER_ADDR=address, MASTER_PORT=29577, GLOO_SOCKET_IFNAME=interface)
    threads = dict(OMP_NUM_THREADS=max(os.cpu_count() // 2, 1))
    env = {key: str(value) for key, value in (threads | dict(os.environ) | torchrun).items()}

    def prepare():
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        enter(namespace)

    command = [sys.executable, ROOT / 'bench.py', '--shard', '--backend=gloo', *arguments]
    return subprocess.Popen(command, env=env, preexec_fn=prepare)


def main(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error = fail
    parser.add_argument('--gbit', type=float, required=True, help='Gbit/s, each way')
    parser.add_argument('--latency_us', type=float, default=0.0, help='of a message, in microseconds')
    options, arguments = parser.parse_known_args(argv)
    if not 0 < options.gbit < 1000:
        fail(f'--gbit is {options.gbit:g}, it must be above 0 and below 1000')
    if not 0 <= options.latency_us < 1e6:
        fail(f'--latency_us is {options.latency_us:g}, it must be at least 0 and below a million')
    if os.geteuid():
        fail('a network namespace needs root; without it, bench.py --shard --gbit=... predicts')
    for tool in ('ip', 'tc'):
        if shutil.which(tool) is None:
            fail(f'{tool} is missing; it is iproute2\'s: apt install iproute2')
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    home = open('/proc/thread-self/ns/net')
    try:
        namespaces, link = make_link(options.gbit, options.latency_us)
        meeting = ADDRESSES[0], 'eth0'
        print(f'link: {link}', flush=True)
    except OSError as error:
        namespaces, meeting = [home, home], ('127.0.0.1', 'lo')
        print(f'link: it could not be made ({error}). What is measured here is loopback; for '
              f'{options.gbit:g} Gbit/s and {options.latency_us:g} us all is predicted', flush=True)
    arguments += [f'--gbit={options.gbit}', f'--latency_us={options.latency_us}']
    processes = [start(i, namespace, *meeting, arguments) for i, namespace in enumerate(namespaces)]
    try:
        while any(process.poll() is None for process in processes):
            if any(process.returncode for process in processes):
                break                   # one has failed, and the other would wait for it
            time.sleep(0.2)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    sys.exit(any(process.returncode for process in processes))


if __name__ == '__main__':
    main(sys.argv[1:])
