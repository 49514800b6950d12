from mini_symposium.cli import main

main()
