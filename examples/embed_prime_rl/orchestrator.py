"""prime-rl's orchestrator with M-GRPO in the place of its GRPO: run it with the arguments of `orchestrator`."""

from prime_rl.entrypoints.orchestrator import main

from mgrpo.integrations import prime_rl

if __name__ == "__main__":
    prime_rl.register("grpo", d_max={"sub": 4}, seed=7, mean="token")
    main()
