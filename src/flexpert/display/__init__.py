"""What commands show and write: tables and lines for people, reports into files."""
