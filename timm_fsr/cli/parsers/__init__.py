"""The flags of each command, apart from its work: help and errors in flags import nothing heavy."""
