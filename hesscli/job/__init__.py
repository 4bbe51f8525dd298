"""The hall: model + data + options -> plan -> blocks -> file. The only place where the rooms meet."""
