"""The same results in less time: what a reader of the method may skip. Nothing here is imported unless it is used."""
