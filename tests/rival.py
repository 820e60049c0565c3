"""One of two drivers: claims the same prefixes as another process at the same moments, and prints who got them."""

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from stockflow.errors import OutputConflictError
from stockflow.output.claims import Heartbeat, new_run
from stockflow.output.ownership import SETTLE_S, admit, check_owner, take
from stockflow.recipe import load_recipe
from stockflow.run.driver import MergeOptions, plan_merge
from stockflow.run.inputs import Inputs
from stockflow.storage import open_store


def main(recipe_path: str, outputs: list[str]) -> None:
    """Claim every output at the moment that standard input names, in seconds since the epoch."""
    recipe = load_recipe(recipe_path)
    plan, _ = plan_merge(Inputs.open(recipe), outputs[0], MergeOptions(2**30, 1))
    print("ready", flush=True)
    moment = float(sys.stdin.readline())

    def claim(output: str) -> str:
        store, run = open_store(output, recipe.storage, writable=True), new_run()
        time.sleep(max(moment - time.time(), 0.0))
        try:
            found = admit(store, plan, overwrite=False)
            with Heartbeat(store, plan.plan_id, run) as heartbeat:
                is_exclusive = heartbeat.is_exclusive()
                take(store, plan, run, found, is_exclusive=is_exclusive)
                time.sleep(1 if is_exclusive else SETTLE_S)  # a claim that does not stand would be taken meanwhile
                check_owner(store, plan.plan_id, "")
        except OutputConflictError as error:
            return str(error)
        return "ours"

    with ThreadPoolExecutor(len(outputs)) as pool:
        print(json.dumps(list(pool.map(claim, outputs))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
