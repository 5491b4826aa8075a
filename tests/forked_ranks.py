"""Ranks by a fork, so that PyTorch is imported once. A command: python forked_ranks.py COUNT PORT PLAN FLAG... is a
training by that many ranks, some of whose steps go wrong by a plan of spoiled_steps."""
import os
import sys


def fork(count, port, work):
    """Calls work() in each rank. What starts threads, such as a network, belongs there: they do not survive a fork."""
    children = []
    for rank in range(count):
        child = os.fork()
        if child == 0:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count),
                              MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            work()
            os._exit(0)
        children.append(child)
    assert all(os.waitpid(child, 0)[1] == 0 for child in children)


if __name__ == "__main__":
    from spoiled_steps import spoiled

    from train import main, parse_args

    number, address, plan, *flags = sys.argv[1:]

    def work():
        with spoiled(plan):
            main(parse_args(flags))
    fork(int(number), address, work)
