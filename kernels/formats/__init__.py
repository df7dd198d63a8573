"""File and block formats that conversion and the runtime share."""
