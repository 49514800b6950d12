"""Files: reading what somebody else wrote, and writing such that a file is whole or not there."""
