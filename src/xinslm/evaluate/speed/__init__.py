"""How fast a model runs on this machine, how much memory it takes, how large its files are."""
