"""`flexpert plan`: real processes join, leave, die and rejoin, and every exchange is checked."""
