"""Checks a result before it uses it: ``python examples/trusted_snapshot/client.py ipc:///tmp/snapshot.ipc``.

A result is a view of memory that the server can write to at any time, also between our check and our use. Here it is
asked to; a real attacker would race with us. With ``snapshot=True`` a result is a private copy, made before we look.
"""

import sys

import torch

from shmtransport import Client

table = torch.arange(30.0).view(3, 10)  # ours alone
scores = torch.tensor([[0.1, 0.7, 0.2], [0.9, 0.0, 0.1]])

for snapshot in (False, True):
    with Client(sys.argv[1] if len(sys.argv) > 1 else "ipc:///tmp/snapshot.ipc", snapshot=snapshot) as client:
        rows = client.call("pick", scores)
        if not ((rows >= 0) & (rows < len(table))).all():  # the check
            raise SystemExit("the server picked a row that does not exist")
        client.call("tamper")
        print("a private copy:" if snapshot else "a borrowed view:", end=" ")
        try:
            print("used rows", rows.tolist(), "->", table[rows][:, 0].tolist())  # the use
        except IndexError as error:
            print(f"the check was in vain: {error}")
