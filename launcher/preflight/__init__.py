"""Are the nodes of an allocation fit to run? Each looks at itself, all of them meet once, then it is judged."""
