def ifeval_task(path):
    raise SystemExit


def own_task(path, config):
    raise SystemExit
