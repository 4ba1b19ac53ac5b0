"""Does a model follow instructions? IFEval, and the user's own tasks."""
