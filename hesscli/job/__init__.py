"""The hall: model + data + options -> plan -> blocks -> file. The only place where the rooms meet.

One file per command. What all that take MODEL DATA begin with is in `setup/`, how a matrix gets into its file in
`matrix/`.
"""
