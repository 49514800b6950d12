"""Files: reading what somebody else wrote, and writing so that a file is whole or not there at all."""
