from mini_symposium.cli.main import main

main()
