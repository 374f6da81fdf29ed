"""Log-probabilities with entropies, GRPO and weighted NLL on an LM head, fused beside materialised.

    python benchmarks/policy.py [--quick] [--resume] [... the options of linear_loss.py]

Measured as benchmarks/linear_loss.py measures losses: whole logits in plain torch, compiled and not, TRL's chunked
kernels, Liger's, ours in both loop orders, and the bare products.  GRPO clips at 0.2 and has a k3 divergence.  Writes
benchmarks/results/policy_<device>.json.  benchmarks/maxsim.py has the score of late interaction.
"""

from __future__ import annotations

from linear_loss import parse, run
from peers import POLICY

if __name__ == "__main__":
    run(parse(__doc__, ("logp_entropy", *POLICY), ("logp_entropy", *POLICY)), "policy")
